"""The checkpoints that a trainer leaves in a run directory."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def find_complete_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end, or None.

    A run can be killed while it writes one; the trainer's state is the last file of each.
    """
    steps = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(steps, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end; going on from an earlier one", checkpoint.name)
            continue
        return checkpoint
    return None
