"""Keep libraries quiet, and let one process of several speak."""

import logging
import os
import sys
import warnings


def is_main_process() -> bool:
    """Return whether this is the one process of a launch that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries() -> None:
    """Send our notes to standard error as plain lines, and keep what libraries say to themselves out of them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("finetune")
    ours.handlers = [handler]  # not one more for every call from another program
    ours.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("bitsandbytes", "accelerate", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Deprecations inside the libraries are for this kit's authors, whose tests turn them into errors.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
