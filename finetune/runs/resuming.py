"""Check that a stopped run can be resumed: from a complete checkpoint, with the same recipe, rows and base checkpoint."""

import difflib
import logging
from pathlib import Path

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.errors import OutputError, TrainingError
from finetune.files.folders import check_output_free, check_writable
from finetune.files.json_files import read_json
from finetune.recipe.sections import Recipe, dump_recipe
from finetune.runs.run_files import RECIPE_FILE, RECORD_FILE, find_result_folder
from finetune.runs.trainer_checkpoints import find_complete_checkpoint

logger = logging.getLogger(__name__)


def check_fresh_output(run: Path) -> None:
    """Check that a run can begin in a folder, which must be empty or not exist.

    Raises:
        OutputError: it is not empty, or is no folder.
    """
    check_writable(run)
    try:
        check_output_free(run)
    except OutputError as error:
        raise OutputError(f"{error}; or resume the run in it with --resume") from None


def find_resume_point(recipe: Recipe, run: Path) -> str:
    """Find the checkpoint to resume from, and check that the recipe is the one that the run began with.

    Raises:
        TrainingError: there is nothing to resume, or the recipe has changed since.
    """
    saved = run / RECIPE_FILE
    if not saved.is_file():
        raise TrainingError(f"{run}: there is no run to resume (no {RECIPE_FILE}); start it without --resume")
    if find_result_folder(run) is not None:
        raise TrainingError(f"{run}: this run has finished; export it, or set another output to train again")
    check_same_recipe(saved, dump_recipe(recipe), "run")
    if recipe.trainer.get("save_only_model"):
        raise TrainingError(
            f"{run}: its checkpoints hold no optimizer state (trainer.save_only_model: true), so training would begin anew from their "
            "weights; use a checkpoint as it is, or start again without this key"
        )
    checkpoint = find_complete_checkpoint(run)
    if checkpoint is None:
        raise TrainingError(
            f"{run}: this run was stopped before its first checkpoint; remove the folder and start again without --resume"
        )
    logger.info("resuming %s from %s", run, checkpoint.name)
    return str(checkpoint)


def check_same_recipe(saved: Path, current: str, what: str) -> None:
    """Check that a recipe is the one that a run or a chain began with; `what` names it in the message.

    Raises:
        TrainingError: it is not; the message lists the lines that differ.
    """
    if changes := _list_changes(saved.read_text(encoding="utf-8"), current):
        raise TrainingError(
            f"{saved.parent}: the recipe has changed since this {what} started, so it cannot be resumed:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nrestore these lines, or resume with the {what}'s own recipe: finetune train {saved} --resume"
        )


def _list_changes(saved: str, current: str) -> list[str]:
    lines = difflib.ndiff(saved.splitlines(), current.splitlines())
    return [f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "-+"]


def check_same_inputs(run: Path, rows_fingerprint: str, base: Path, judge: str | None) -> None:
    """Check by content that rows, base checkpoint and judge are those that the run began with.

    Raises:
        TrainingError: one of them has changed.
    """
    record = read_json(run / RECORD_FILE)
    now = {
        "the rows": (record["data"]["fingerprint"], rows_fingerprint),
        "the base checkpoint": (record["base_fingerprint"], fingerprint_checkpoint(base)),
        "the judge": (record["judge_fingerprint"], judge),
    }
    changed = " and ".join(name for name, (before, after) in now.items() if before != after)
    if changed:
        raise TrainingError(
            f"{run}: {changed} changed since this run started, so it cannot be resumed; "
            "restore what changed, or start again with another output"
        )
