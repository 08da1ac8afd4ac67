"""Load a checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from tokenizers import Tokenizer

from finetune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, *, needs_padding: bool = True) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer; set padding on the right with `<pad>` where it has no padding token.

    Training needs a padding token. Other uses do not, and a tokenizer without one stays as it is.

    Raises:
        CheckpointError: the tokenizer cannot be read without running code from the folder, or has no padding token.
    """
    try:
        if (file := folder / "tokenizer.json").is_file():
            _require_pieces(Tokenizer.from_file(str(file)))
        # An attribute of the module: importing the name would load the registry of architectures, for seconds.
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library in Rust raises plain exceptions for patterns and merges that it cannot use
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); "
            "the folder needs the checkpoint's tokenizer.json and tokenizer_config.json"
        ) from error
    return _complete(tokenizer, folder, needs_padding)


def load_tokenizer_file(folder: Path, *, needs_padding: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer from `tokenizer.json` alone where there is one, which is quick.

    The result is enough for chat templates and control tokens.

    Raises:
        CheckpointError: see `load_tokenizer`.
    """
    if not (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder, needs_padding=needs_padding)
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        _require_pieces(tokenizer.backend_tokenizer)
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); download it again"
        ) from error
    return _complete(tokenizer, folder, needs_padding)


def _require_pieces(whole: Tokenizer) -> None:
    """Raise an error for a `tokenizer.json`, read as a whole, that has no vocabulary.

    For some classes, such as `LlamaTokenizer`, transformers takes parts of the file, and makes a tokenizer without those that lack.
    """
    if whole.get_vocab_size(with_added_tokens=False) == 0:
        raise ValueError("its vocabulary is empty")


def _complete(tokenizer: PreTrainedTokenizerBase, folder: Path, needs_padding: bool) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if "<pad>" not in tokenizer.get_vocab():
            if not needs_padding:
                return tokenizer
            raise CheckpointError(
                f"{folder}: the tokenizer has no padding token and no <pad> in its vocabulary; use YuLan-Mini's tokenizer"
            )
        tokenizer.pad_token = "<pad>"
    return tokenizer
