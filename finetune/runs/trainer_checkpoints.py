"""Find the newest whole checkpoint of a run."""

import json
import logging
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.errors import TrainingError
from finetune.files.json_files import read_regular_text
from finetune.files.safety.manifests import find_damage
from finetune.runs.run_files import COUNTS_FILE, TRAINER_STATE_FILE, list_trainer_checkpoints, read_step

# Reading more than this again would delay the start of a large run; the manifest has compared it already.
_MOST_STATE_BYTES = 1 << 30
# What Python's reader of archives raises for one that is damaged.
_DAMAGES = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError)

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


def remove_older_checkpoints(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the checkpoints of a run with the lowest steps, so that `limit` are left; the newest and the best ones stay.

    The trainer goes by the time of each folder: where a clock is late or a folder was copied, it removes what it has just saved,
    and it counts every folder `checkpoint-…`, also one that a person made. Source: `rotate_checkpoints`, transformers 5.23.
    """
    found = list_trainer_checkpoints(run)
    kept = {checkpoint.name for checkpoint in found[:1]} | ({Path(best).name} if best else set())
    spare = [checkpoint for checkpoint in found if checkpoint.name not in kept]
    if limit is not None and limit > 0:
        for checkpoint in spare[max(0, limit - (len(found) - len(spare))) :]:
            remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint of a run; of one that lies elsewhere, only the link to it."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)


def check_name(checkpoint: Path) -> None:
    """Check that a whole checkpoint is the one that its name says.

    Raises:
        TrainingError: it was renamed, or is a copy of another.
    """
    step, _ = read_last_step(checkpoint)
    if step != read_step(checkpoint):
        raise TrainingError(
            f"{checkpoint}: holds step {step}, so it was renamed, or is a copy of another; give it the name checkpoint-{step}, or another "
            "name if there is such a folder"
        )


def read_last_step(checkpoint: Path) -> tuple[int, int]:
    """Return the step of a whole checkpoint, and the last step of its run.

    Raises:
        TrainingError: the trainer's state is not what a trainer writes.
    """
    step, last = _read_numbers(checkpoint / TRAINER_STATE_FILE, "global_step", "max_steps")
    if step is None or last is None:
        raise TrainingError(f"{checkpoint / TRAINER_STATE_FILE}: holds no step; remove the folder")
    return int(step), int(last)


def has_stopped_early(checkpoint: Path) -> bool:
    """Tell whether a run ended at a whole checkpoint because its evaluations got no better.

    Raises:
        TrainingError: the trainer's state is not what a trainer writes.
    """
    file = checkpoint / TRAINER_STATE_FILE
    try:
        control = json.loads(read_regular_text(file)).get("stateful_callbacks", {}).get("TrainerControl", {})
        return bool(control.get("args", {}).get("should_training_stop", False))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{file}: cannot be read ({error}); remove the folder") from error


def read_token_count(checkpoint: Path) -> int | None:
    """Return how many tokens a run had trained until a whole checkpoint; None for a trainer that does not count them.

    Raises:
        TrainingError: the file is not what the kit writes.
    """
    (count,) = _read_numbers(checkpoint / COUNTS_FILE, "num_tokens")
    return None if count is None else int(count)


def _read_numbers(file: Path, *keys: str) -> list[Any]:
    try:
        content = json.loads(read_regular_text(file))
        return [None if content[key] is None else int(content[key]) for key in keys]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{file}: cannot be read ({error}); remove the folder") from error


def check_states(checkpoint: Path, names: Iterable[str]) -> None:
    """Check the files of states that a trainer continues from, by the checksums that torch wrote into them.

    A manifest that was written anew covers damage, and transformers goes on without a file that it does not find.

    Raises:
        TrainingError: one is missing or damaged.
    """
    for name in names:
        if (damage := _find_damage_of_state(checkpoint / name)) is not None:
            raise TrainingError(
                f"{checkpoint}: {name} {damage}, so the run could only go on as another one; remove this folder, and resume from the "
                "checkpoint before it"
            )


def _find_damage_of_state(file: Path) -> str | None:
    if not file.is_file():  # a pipe or a device may never end
        return "is no file" if file.exists() else "is missing"
    try:
        with zipfile.ZipFile(file) as archive:
            # torch compresses nothing, so that nothing can grow without an end here.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return "is compressed"
            damaged = archive.testzip() if file.stat().st_size <= _MOST_STATE_BYTES else None
    except _DAMAGES as error:
        return f"is damaged ({error})"
    return None if damaged is None else f"is damaged (its part {damaged!r})"
