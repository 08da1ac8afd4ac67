"""Find the newest complete checkpoint of a run."""

import json
import logging
from pathlib import Path

from finetune.runs.run_files import TRAINER_STATE_FILE, list_trainer_checkpoints

logger = logging.getLogger(__name__)


def find_complete_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    for checkpoint in list_trainer_checkpoints(run):
        if is_complete_checkpoint(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete; trying an earlier checkpoint", checkpoint.name)
    return None


def is_complete_checkpoint(checkpoint: Path) -> bool:
    """Tell whether the trainer wrote all of a checkpoint.

    A run can be killed while it writes one. The file of the trainer's state is written last, so it tells.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
