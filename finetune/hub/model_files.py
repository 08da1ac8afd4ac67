"""The files of a model's repository beside its weights."""

# Configuration and tokenizer, with which rows are read, checked and shown.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)
# What an export says about its base, and passes on with it.
LICENCE_FILES = ("README.md", "LICEN[CS]E*")
