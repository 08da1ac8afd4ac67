"""Keep the libraries quiet, and print in one process only."""

import logging
import os
import sys
import warnings

from finetune.files.terminal import escape_controls


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes; a launch of several processes has one."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Return whether this is one of several processes of a launch."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


class _SafeFormatter(logging.Formatter):
    """Escapes control characters, which file names and rows may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def quiet_libraries() -> None:
    """Print the kit's notes to standard error as plain lines, and suppress the libraries' notes and warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter("%(message)s"))
    ours = logging.getLogger("finetune")
    ours.handlers = [handler]  # replaced, so that repeated calls from another program add no second handler
    ours.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("bitsandbytes", "accelerate", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Users cannot act on deprecations inside the libraries. The kit's tests turn them into errors.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
