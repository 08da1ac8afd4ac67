"""A small byte-level BPE tokenizer, as models of GPT-2's family have it, with YuLan-Mini's special tokens at their ids."""

import json

from legacy_tokenizer import SPECIAL_TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TOKENS = 1200


def write_byte_level_tokenizer(folder, texts):
    """Train on texts, and write `tokenizer.json` and `tokenizer_config.json` in the place of the folder's tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [SPECIAL_TOKENS.get(number, f"<reserved_{number}>") for number in range(max(SPECIAL_TOKENS) + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in reserved],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
