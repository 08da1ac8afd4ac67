"""Train and write nano's tokenizer, of the published kind: SentencePiece's BPE with byte fallback, without a `tokenizer.model`.

Its files are those of the published checkpoints: `tokenizer.json`, and the keys of `LlamaTokenizer` with `legacy: true` in
`tokenizer_config.json`. The special tokens have their published ids, digits stand alone, and a line break is a byte.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune.files.json_files import write_json

_SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    102: "<pad>",
    103: "<reasoning_step>",
    104: "<|start_header_id|>",
    105: "<|end_header_id|>",
    106: "<|eot_id|>",
}
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_EXACT = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_SPACE = "▁"
_LONG_CHINESE = re.compile("[\u4e00-\u9fff]{3}")


def write_nano_tokenizer(folder: Path, texts: Sequence[str], tokens: int, max_tokens: int) -> None:
    """Train a tokenizer of at most `tokens` tokens and write its three files; `max_tokens` is the model's longest input."""
    vocabulary, merges = _train(texts, tokens)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = _make_normalizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in _SPECIAL_TOKENS.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _describe(max_tokens))
    write_json(folder / "special_tokens_map.json", {name: {"content": text, **_EXACT} for name, text in _NAMES.items()})


def _train(texts: Sequence[str], tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges: reserved tokens, bytes, characters, and what is merged from them."""
    trainee = Tokenizer(models.BPE())
    trainee.normalizer = _make_normalizer()
    # Only for training, as SentencePiece does: no piece reaches over a space, a line break or punctuation, or holds two digits.
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Split(_SPACE, "merged_with_next"),
            pre_tokenizers.Split(Regex(rf"\d|[[\p{{P}}\p{{S}}]&&[^{_SPACE}]]"), "isolated"),
        ]
    )
    reserved = [_SPECIAL_TOKENS.get(number, f"<unused_{number}>") for number in range(max(_SPECIAL_TOKENS) + 1)]
    first = [*reserved, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2 * tokens, special_tokens=first, show_progress=False)
    # A turn begins behind the line break of its header, so its first word has no space before it.
    trainee.train_from_iterator([f"\n{text}" for text in texts], trainer)
    model: dict[str, Any] = json.loads(trainee.to_str())["model"]
    # The bundled texts are few: whole Chinese sentences would be merged.
    merges = [(one, two) for one, two in model["merges"] if not _LONG_CHINESE.search(one + two)]
    made = {one + two for one, two in model["merges"]}
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].__getitem__) if piece not in made]
    merges = merges[: tokens - len(pieces)]
    pieces += [one + two for one, two in merges]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _make_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])


def _describe(max_tokens: int) -> dict[str, Any]:
    added = {str(number): {"content": text, **_EXACT, "special": True} for number, text in _SPECIAL_TOKENS.items()}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": max_tokens,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **_NAMES,
    }
