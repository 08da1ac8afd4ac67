"""The checkpoints that a trainer leaves in a run directory, and which of them are whole."""

import json
import logging
from pathlib import Path

from finetune.runs.run_files import TRAINER_STATE_FILE, list_trainer_checkpoints

logger = logging.getLogger(__name__)


def find_complete_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end, or None.

    A run can be killed while it writes one; the trainer's state is the last file of each.
    """
    for checkpoint in list_trainer_checkpoints(run):
        try:
            json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end; going on from an earlier one", checkpoint.name)
            continue
        return checkpoint
    return None
