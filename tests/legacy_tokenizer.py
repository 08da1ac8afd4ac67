"""A small tokenizer of the published kind: SentencePiece's BPE with byte fallback, under LlamaTokenizer with `legacy: true`."""

import json

from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    102: "<pad>",
    103: "<reasoning_step>",
    104: "<|start_header_id|>",
    105: "<|end_header_id|>",
    106: "<|eot_id|>",
}
# Each piece but a single character is made of two others, the earlier the sooner: "▁user" is one piece, "user" is three.
MERGES = [("e", "r"), ("▁", "u"), ("▁u", "s"), ("▁us", "er"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]


def write_legacy_tokenizer(folder):
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` with the published keys."""
    pieces = [SPECIAL_TOKENS.get(number, f"<filler_{number}>") for number in range(107)]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", *("".join(pair) for pair in MERGES)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    content = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": {
            str(number): {"content": text, **options, "special": True} for number, text in SPECIAL_TOKENS.items()
        },
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 2048,
        "tokenizer_class": "LlamaTokenizer",
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    special = {name: {"content": text, **options} for name, text in names.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
