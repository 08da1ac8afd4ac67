"""Resume a stopped run: only with the same recipe, rows and base, and from a checkpoint that is whole."""

import difflib
import logging
from pathlib import Path

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.errors import OutputError, TrainingError
from finetune.files.folders import check_output_free
from finetune.files.json_files import read_json
from finetune.recipe.sections import Recipe, dump_recipe
from finetune.runs.run_files import RECIPE_FILE, RECORD_FILE, find_result_folder
from finetune.runs.trainer_checkpoints import find_complete_checkpoint

logger = logging.getLogger(__name__)


def find_resume_point(recipe: Recipe, run: Path, resume: bool) -> str | None:
    """Return the checkpoint to resume from, or None for a fresh run; a resumed run must be the same run.

    Raises:
        OutputError: a fresh run would write into a folder that is not empty.
        TrainingError: there is nothing to resume, or the recipe has changed since.
    """
    if not resume:
        try:
            check_output_free(run)
        except OutputError as error:
            raise OutputError(f"{error}; or go on with the run in it by --resume") from None
        return None
    saved = run / RECIPE_FILE
    if not saved.is_file():
        raise TrainingError(f"{run}: there is no run to resume (no {RECIPE_FILE}); start it without --resume")
    if find_result_folder(run) is not None:
        raise TrainingError(f"{run}: this run has finished; export it, or set another output to train again")
    check_same_recipe(saved, dump_recipe(recipe), "run")
    checkpoint = find_complete_checkpoint(run)
    if checkpoint is None:
        raise TrainingError(
            f"{run}: was stopped before its first checkpoint; remove the folder and start again without --resume"
        )
    logger.info("resuming %s from %s", run, checkpoint.name)
    return str(checkpoint)


def check_same_recipe(saved: Path, current: str, what: str) -> None:
    """Compare a recipe with the one that a run or a chain began with.

    Raises:
        TrainingError: naming the lines that differ.
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
    """Compare rows, base and judge with those that the run began with, by content.

    Raises:
        TrainingError: a data file, the checkpoint or the judge has changed meanwhile.
    """
    record = read_json(run / RECORD_FILE)
    now = {
        "the rows": (record["data"]["fingerprint"], rows_fingerprint),
        "the base": (record["base_fingerprint"], fingerprint_checkpoint(base)),
        "the judge": (record["judge_fingerprint"], judge),
    }
    changed = " and ".join(name for name, (before, after) in now.items() if before != after)
    if changed:
        raise TrainingError(
            f"{run}: {changed} changed since this run started, so going on would be another run; "
            "restore what changed, or start again with another output"
        )
