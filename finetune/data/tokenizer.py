"""Load a checkpoint's tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.errors import CheckpointError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, with its own `<pad>` and padding on the right.

    Raises:
        CheckpointError: the folder holds no tokenizer that can be read without running its code.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]}); "
            "the folder needs the checkpoint's tokenizer.json and tokenizer_config.json"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if "<pad>" not in tokenizer.get_vocab():
            raise CheckpointError(
                f"{folder}: the tokenizer has no padding token and no <pad> in its vocabulary; use YuLan-Mini's tokenizer"
            )
        tokenizer.pad_token = "<pad>"
    return tokenizer
