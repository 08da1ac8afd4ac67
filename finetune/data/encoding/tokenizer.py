"""Load a checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, with its own `<pad>` and padding on the right.

    Raises:
        CheckpointError: the folder holds no tokenizer that can be read without running its code.
    """
    import transformers

    try:
        # By attribute: transformers then loads its registry of architectures, which takes seconds, only here.
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]}); "
            "the folder needs the checkpoint's tokenizer.json and tokenizer_config.json"
        ) from error
    return _complete(tokenizer, folder)


def load_tokenizer_file(folder: Path) -> PreTrainedTokenizerBase:
    """Load `tokenizer.json` itself where there is one: enough for templates and control tokens, and quick.

    Raises:
        CheckpointError: see `load_tokenizer`.
    """
    if not (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    import transformers

    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: cannot be read ({str(error).splitlines()[0]}); download it again"
        ) from error
    return _complete(tokenizer, folder)


def _complete(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if "<pad>" not in tokenizer.get_vocab():
            raise CheckpointError(
                f"{folder}: the tokenizer has no padding token and no <pad> in its vocabulary; use YuLan-Mini's tokenizer"
            )
        tokenizer.pad_token = "<pad>"
    return tokenizer
