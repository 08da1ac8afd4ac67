"""Find the newest whole checkpoint of a run."""

import json
import logging
from pathlib import Path

from finetune.errors import TrainingError
from finetune.files.safety.manifests import find_damage
from finetune.runs.run_files import TRAINER_STATE_FILE, list_trainer_checkpoints

logger = logging.getLogger(__name__)


def find_complete_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run whose files are all as they were written, or None.

    A run can be killed while it writes a checkpoint, and a disk can damage one later. The manifest is written last, so it tells.
    """
    for checkpoint in list_trainer_checkpoints(run):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is not whole (%s); trying an earlier checkpoint", checkpoint.name, damage)
    return None


def read_last_step(checkpoint: Path) -> tuple[int, int]:
    """Return the step of a whole checkpoint, and the last step of its run.

    Raises:
        TrainingError: the trainer's state is not what a trainer writes.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(
            f"{checkpoint / TRAINER_STATE_FILE}: cannot be read ({error}); remove the folder"
        ) from error
