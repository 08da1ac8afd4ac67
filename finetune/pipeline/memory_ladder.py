"""Train within the device's memory: choose settings by the plan, and where memory still runs out, change them and continue."""

import gc
import logging
import traceback
from collections.abc import Iterator
from dataclasses import replace

import torch
import yaml

from finetune.errors import TrainingError, describe_count
from finetune.files.json_files import write_text
from finetune.models.engine import find_engine
from finetune.models.precision import choose_device
from finetune.planning.apart import plan_apart
from finetune.planning.automatic import DECIDED, choose_settings, describe_choices
from finetune.planning.changes import Change, apply_change, checkpoint_every_layer
from finetune.planning.forecast import Plan, check_fits, find_target, make_plan
from finetune.recipe.batches import AUTO, read_accumulation, read_batch
from finetune.recipe.recipe_file import ACCUMULATION, BATCH, CHECKPOINTING, CHECKPOINTING_OPTIONS
from finetune.recipe.sections import Recipe, dump_recipe
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import remove_made_files
from finetune.runs.run_files import RECIPE_FILE
from finetune.runs.summary import RunSummary
from finetune.runs.trainer_checkpoints import find_complete_checkpoint
from finetune.training.run import run_training

logger = logging.getLogger(__name__)


def train_on_device(
    resolved: ResolvedRecipe, resume: bool = False, force: bool = False, shared: frozenset[str] | None = None
) -> RunSummary:
    """Train on this process's device: by the plan on a GPU or with `trainer.auto`, else as the recipe says.

    `shared` is that of `run_training`.

    Raises:
        FinetuneError: see `train_as_planned` and `run_training`.
    """
    device = choose_device(resolved.uses_cpu)
    if device.type == "cuda" or resolved.recipe.trainer.get(AUTO):
        return train_as_planned(resolved, device, resume, force, shared)
    return run_training(resolved, resume, shared=shared)


def train_as_planned(
    resolved: ResolvedRecipe,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    shared: frozenset[str] | None = None,
) -> RunSummary:
    """Choose the settings that `trainer.auto` leaves open, refuse what does not fit a GPU unless forced, and train.

    Raises:
        TrainingError: the run does not fit.
    """
    if resume:
        resolved = restore_choices(resolved)
    target = find_target(device)
    resolved, choices = plan_apart(choose_settings, resolved, target)
    planned = None
    if choices:
        logger.info("%s", describe_choices(choices))
        planned = choices[-1].peak_bytes
    elif device.type == "cuda" and not force:
        planned = plan_apart(check_fits, resolved, target).peak_bytes
    return train_within_memory(resolved, resume, planned, shared)


def train_within_memory(
    resolved: ResolvedRecipe,
    resume: bool = False,
    planned_bytes: int | None = None,
    shared: frozenset[str] | None = None,
) -> RunSummary:
    """Train; where memory runs out under `trainer.auto`, change settings that keep the updates the same, and continue.

    The run continues from its newest checkpoint, or starts again where it has none.

    Raises:
        TrainingError: nothing is left to change; the message names the parts that take the memory.
    """
    started_fresh = not resume
    while True:
        try:
            return run_training(resolved, resume, planned_bytes, shared)
        except torch.OutOfMemoryError as error:
            reason = ". ".join(str(error).split(". ")[:2])
            traceback.clear_frames(error.__traceback__)  # the frames would keep their tensors on the device
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # Other processes do not know that this one ran out of memory, so several cannot change settings together.
        steps = list_steps_down(resolved) if resolved.recipe.trainer.get(AUTO) and find_engine() == "one" else iter(())
        change = next(steps, None)
        if change is None:
            raise TrainingError(describe_shortage(resolved, reason))
        resolved, planned_bytes = apply_change(resolved, change), None
        resume = _prepare_restart(resolved, started_fresh)
        logger.warning(
            "out of memory (%s); %s with %s", reason, "continuing" if resume else "starting again", change.describe()
        )


def list_steps_down(resolved: ResolvedRecipe) -> Iterator[Change]:
    """Yield changes that need less memory and give the same updates, the fastest first."""
    recipe, smallest = resolved.recipe, resolved.method.smallest_batch
    batch, rows = read_batch(recipe), _count_rows(recipe)
    smaller = next((size for size in range(batch - 1, smallest - 1, -1) if rows % size == 0), None)
    if smaller is not None:
        settings = {f"trainer.{BATCH}": smaller, f"trainer.{ACCUMULATION}": rows // smaller}
        yield Change(
            settings, f"a smaller micro-batch size; the effective batch size stays {describe_count(rows, 'row')}"
        )
    if (more := checkpoint_every_layer(recipe.trainer)) is not None:
        yield Change(more, "gradient checkpointing of every layer")
    if not recipe.trainer.get("activation_offloading") and torch.cuda.is_available():
        yield Change({"trainer.activation_offloading": True}, "activations wait in the host's memory")


def _prepare_restart(resolved: ResolvedRecipe, started_fresh: bool) -> bool:
    """Prepare a run's folder for a changed recipe; return True where it has a checkpoint to continue from."""
    run = resolved.output
    if run.is_dir() and find_complete_checkpoint(run) is not None:
        write_text(run / RECIPE_FILE, dump_recipe(resolved.recipe))
        return True
    if run.is_dir() and started_fresh:  # it was empty when this run began, and has no checkpoint
        remove_made_files(run)
    return False


def restore_choices(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """Return a recipe with the settings that `trainer.auto` chose when its run began, for resuming that run."""
    recipe, saved = resolved.recipe, resolved.output / RECIPE_FILE
    if not recipe.trainer.get(AUTO) or not saved.is_file():
        return resolved
    content = yaml.safe_load(saved.read_text(encoding="utf-8"))
    chosen = {key: value for key, value in content.get("trainer", {}).items() if key in DECIDED}
    restored = replace(recipe, trainer={**chosen, **recipe.trainer})
    # Where memory ran out, the run continued with a smaller micro-batch size than its recipe sets, and must resume with it.
    before = replace(recipe, trainer=chosen)
    if _count_rows(before) == _count_rows(restored) and read_batch(before) < read_batch(restored):
        split = {BATCH: read_batch(before), ACCUMULATION: read_accumulation(before)}
        restored = replace(restored, trainer={**restored.trainer, **split})
    keys = (CHECKPOINTING, CHECKPOINTING_OPTIONS, "activation_offloading")
    steps = {key: chosen[key] for key in keys if chosen.get(key)}
    return resolved.change(trainer={**restored.trainer, **steps})


def _count_rows(recipe: Recipe) -> int:
    return read_batch(recipe) * read_accumulation(recipe)


def describe_shortage(resolved: ResolvedRecipe, reason: str) -> str:
    """Say which parts take the memory by the plan, which of them grow with the length of rows, and what would need less."""
    recipe = resolved.recipe
    target = replace(find_target(choose_device(resolved.uses_cpu)), memory_bytes=None)
    plan = plan_apart(make_plan, resolved, target)
    half = replace(recipe.data, max_tokens=max(recipe.data.max_tokens // 2, 8))
    shorter = plan_apart(make_plan, resolved.change(data=half), target)
    grown = _list_growth(plan, shorter)
    largest = ", ".join(f"{part} {size / 1e9:.2f} GB" for part, size in list(plan.parts.items())[:3])
    suggestions = (
        plan.suggestions
        if recipe.trainer.get(AUTO)
        else ("trainer.auto=true chooses settings that fit", *plan.suggestions)
    )
    return (
        f"out of memory ({reason}). By the plan a step of full rows needs {plan.peak_bytes / 1e9:.2f} GB: {largest}; "
        f"rows half as long would save {grown}. It would take less with\n  " + "\n  ".join(suggestions)
    )


def _list_growth(plan: Plan, shorter: Plan) -> str:
    growth = {part: size - shorter.parts.get(part, 0) for part, size in plan.parts.items()}
    grown = sorted(((size, part) for part, size in growth.items() if size > 0), reverse=True)
    return ", ".join(f"{size / 1e9:.2f} GB of {part}" for size, part in grown[:3]) or "nothing"
