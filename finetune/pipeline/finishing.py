"""Train a recipe that may have been trained before: take a finished run, resume a stopped one, or begin."""

import gc
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import OutputError, TrainingError
from finetune.pipeline.memory_ladder import restore_choices, train_on_device
from finetune.pipeline.same_speed import join_choices
from finetune.recipe.sections import dump_recipe
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import check_same_recipe, has_saved_result, read_speed, remove_made_files
from finetune.runs.run_files import RECIPE_FILE, RECORD_FILE, find_result_folder
from finetune.runs.trainer_checkpoints import find_complete_checkpoint
from finetune.training.run import check_finished_run

logger = logging.getLogger(__name__)

# What experiments of several runs report of each.
REPORTED = ("run", "steps", "tokens", "train_loss", "eval_loss", "seconds")


@dataclass(frozen=True)
class FinishedTraining:
    """The summary of a run as plain values; `was_done` says that it had finished before."""

    summary: dict[str, Any]
    was_done: bool


def finish_training(
    resolved: ResolvedRecipe,
    force: bool = False,
    wait: Callable[[], None] = lambda: None,
    *,
    is_writer: bool = True,
    shared: frozenset[str] | None = None,
) -> FinishedTraining:
    """Train what is left of a recipe; `force` also trains what by the plan does not fit, `shared` is that of `run_training`.

    Where several processes call it together, `wait` waits for all of them, and one is the writer.

    Raises:
        FinetuneError: the user can mend what stopped the run, or a finished run had other inputs.
    """
    run = resolved.output
    summary = read_summary(run)
    checkpoint = find_complete_checkpoint(run) if summary is None and run.is_dir() else None
    is_saved = summary is None and has_saved_result(run)
    wait()  # every process has read the folder before one changes it
    if summary is not None:
        check_finished_run(restore_choices(resolved))
        logger.info("%s: finished already", run)
        return FinishedTraining(summary, True)
    if is_writer and run.is_dir() and checkpoint is None and not is_saved:
        remove_made_files(run)
    wait()
    outcome = train_on_device(resolved, checkpoint is not None or is_saved, force, shared)
    return FinishedTraining(json.loads(json.dumps(asdict(outcome))), False)


def finish_compared(resolved: ResolvedRecipe, runs: Iterable[Path]) -> FinishedTraining:
    """Train what is left of a recipe whose result is compared with that of other runs; `runs` are their folders, and may hold its own.

    With `model.speed: auto` the first of them that trains decides by its clock, and the others do the same.

    Raises:
        FinetuneError: see `finish_training`, and the record of another run is damaged.
    """
    others = (run for run in runs if run.resolve() != resolved.output.resolve())
    shared = join_choices(others) if resolved.recipe.model.speed == "auto" else None
    return finish_training(resolved, shared=shared)


def check_earlier_run(resolved: ResolvedRecipe) -> None:
    """Check that a run of an earlier call had this recipe and, if it has finished, these rows and this base.

    Raises:
        OutputError: it had others.
    """
    resolved = restore_choices(resolved)
    run, saved = resolved.output, resolved.output / RECIPE_FILE
    if not saved.is_file():
        return
    try:
        if read_summary(run) is None:
            check_same_recipe(saved, dump_recipe(resolved.recipe), "run")
        else:
            check_finished_run(resolved)
        if resolved.recipe.model.speed == "auto":  # the other runs read it, too
            read_speed(run)
    except TrainingError as error:
        raise OutputError(f"{error}\nor choose another folder with -o") from error


def read_summary(run: Path) -> dict[str, Any] | None:
    """Read the summary of a finished run, or return None where it has not finished."""
    try:
        record = json.loads((run / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_finished = record["status"] == "finished" and find_result_folder(run) is not None
    return dict(record["result"]) if is_finished else None


def free_memory() -> None:
    """Free what the run or the model before has left: a trainer and its callbacks refer to each other, and keep the model alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
