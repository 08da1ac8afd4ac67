"""Find how a recipe fits: `trainer.auto` keeps the rows of a step, and the rest follows from the device's memory.

In this order, and as little as is needed: keep all activations, compute layers twice, move what they keep to the host's memory,
hold the optimizer in 8 bits and pages. Then as many rows at once as fit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import MachineError, RecipeError, TrainingError
from finetune.planning.changes import list_changes
from finetune.planning.forecast import Plan, Target, describe_verdict, make_plan
from finetune.recipe.batches import AUTO, read_global_batch
from finetune.recipe.recipe_file import ACCUMULATION, BATCH, GLOBAL_BATCH
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.resolved_recipe import ResolvedRecipe

_KEEP = {"gradient_checkpointing": False}
_AGAIN = {"gradient_checkpointing": True}
_OFFLOAD = {**_AGAIN, "activation_offloading": True}
_PAGED = {**_OFFLOAD, "optim": "paged_adamw_8bit"}
_LEVELS: tuple[tuple[Mapping[str, Any], str], ...] = (
    (_KEEP, "nothing is computed twice"),
    (_AGAIN, "layers are computed again in the backward pass"),
    (_OFFLOAD, "what layers keep waits in the host's memory"),
    (_PAGED, "optimizer states in 8 bits and pages, which rounds them"),
)
DECIDED = (BATCH, ACCUMULATION, *_PAGED)


@dataclass(frozen=True)
class Choice:
    """Settings that were chosen, why, the peak with them, and how much lower it is than with the choice before."""

    settings: Mapping[str, Any]
    reason: str
    peak_bytes: int
    saves_bytes: int

    def describe(self) -> str:
        """Return one line for a person."""
        settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in self.settings.items())
        saved = f", saves {self.saves_bytes / 1e9:.2f} GB" if self.saves_bytes > 0 else ""
        return f"{settings}: {self.reason}; peak {self.peak_bytes / 1e9:.2f} GB{saved}"


def choose_settings(resolved: ResolvedRecipe, target: Target) -> tuple[ResolvedRecipe, tuple[Choice, ...]]:
    """Return a recipe with what `trainer.auto` leaves open filled in, and why; any other recipe as it is.

    Keys that the recipe sets are kept.

    Raises:
        RecipeError: the rows of a step cannot be split between the processes.
        MachineError: the target has no memory to fit.
        TrainingError: nothing that keeps the training fits.
    """
    said = set(resolved.recipe.trainer)
    # A recipe whose settings were chosen once has all three keys.
    if not resolved.recipe.trainer.get(AUTO) or {BATCH, ACCUMULATION, *_KEEP} <= said:
        return resolved, ()
    if target.memory_bytes is None:
        raise MachineError("trainer.auto: say what has to be fitted: --memory 8GB, or --gpu NAME")
    is_split = {BATCH, ACCUMULATION} <= said
    rows = _count_rows(resolved, target, is_split)
    resolved = _split_rows(resolved, rows, _read_smallest_batch(resolved))
    resolved, plan, choices = _choose_level(resolved, target)
    if is_split:
        return resolved, tuple(choices)
    resolved, plan = _grow_batch(resolved, target, plan, rows)
    settings = {key: resolved.recipe.trainer[key] for key in (BATCH, ACCUMULATION)}
    return resolved, (*choices, Choice(settings, f"{rows * target.processes} rows a step", plan.peak_bytes, 0))


def _read_smallest_batch(resolved: ResolvedRecipe) -> int:
    """Return the micro-batch size that the choice begins with: the recipe's, or the smallest that its method allows."""
    return int(resolved.recipe.trainer.get(BATCH, resolved.method.smallest_batch))


def _count_rows(resolved: ResolvedRecipe, target: Target, is_split: bool) -> int:
    """Return the rows of one process's share of a step."""
    recipe, batch = resolved.recipe, _read_smallest_batch(resolved)
    if is_split:
        rows = batch * int(recipe.trainer[ACCUMULATION])
        if recipe.trainer.get(GLOBAL_BATCH, rows * target.processes) != rows * target.processes:
            raise RecipeError(
                "trainer",
                [
                    f"global_batch: {recipe.trainer[GLOBAL_BATCH]} rows, but {BATCH} and {ACCUMULATION} make "
                    f"{rows * target.processes} with {target.processes} processes; leave one of the two out"
                ],
            )
        return rows
    rows, left = divmod(read_global_batch(recipe), target.processes)
    if left or rows % batch:
        raise RecipeError(
            "trainer",
            [
                f"global_batch: {read_global_batch(recipe)} rows cannot be split evenly between {target.processes} processes "
                f"in batches of {batch}"
            ],
        )
    return rows


def _split_rows(resolved: ResolvedRecipe, rows: int, batch: int) -> ResolvedRecipe:
    return resolved.change_trainer(**{BATCH: batch, ACCUMULATION: rows // batch})


def _choose_level(resolved: ResolvedRecipe, target: Target) -> tuple[ResolvedRecipe, Plan, list[Choice]]:
    choices: list[Choice] = []
    before = 0
    for settings, reason in _list_levels(resolved, target):
        changed = resolved.change_trainer(**settings)
        plan = make_plan(changed, target)
        choices.append(Choice(settings, reason, plan.peak_bytes, before - plan.peak_bytes))
        if plan.fits:
            return changed, plan, choices
        before = plan.peak_bytes
    raise TrainingError(
        f"trainer.auto: {describe_verdict(plan)}, a row at a time, with\n  {choices[-1].describe()}\nit would take less with\n  "
        + "\n  ".join(change.describe() for change in list_changes(changed) if not change.keeps_training)
    )


def _list_levels(resolved: ResolvedRecipe, target: Target) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the levels that the recipe's own keys and the device leave; the last is there in any case."""
    said, method = resolved.recipe.trainer, resolved.method
    known = read_trainer_options(method.config_module, method.config_class)
    usable = [
        (settings, reason)
        for settings, reason in _LEVELS
        if all(said.get(key, value) == value for key, value in settings.items())
        and ("activation_offloading" not in settings or (target.is_gpu and "activation_offloading" in known))
        and (target.engine != "fsdp2" or "optim" not in settings)
    ]
    yield from usable or [({}, "as the recipe says")]


def _grow_batch(resolved: ResolvedRecipe, target: Target, plan: Plan, rows: int) -> tuple[ResolvedRecipe, Plan]:
    """Compute as many rows at once as fit: what a row adds is measured once, and the result is planned to be sure."""
    start = resolved.recipe.trainer[BATCH]
    larger = [batch for batch in range(start + 1, rows + 1) if rows % batch == 0]
    if not larger or plan.memory_bytes is None:
        return resolved, plan
    second = _split_rows(resolved, rows, larger[0])
    planned = make_plan(second, target)
    if not planned.fits:
        return resolved, plan
    a_row = max((planned.peak_bytes - plan.peak_bytes) // (larger[0] - start), 1)
    room = start + (plan.memory_bytes - plan.peak_bytes) // a_row
    for batch in sorted((batch for batch in larger[1:] if batch <= room), reverse=True):
        grown = _split_rows(resolved, rows, batch)
        attempt = make_plan(grown, target)
        if attempt.fits:
            return grown, attempt
    return second, planned


def describe_choices(choices: tuple[Choice, ...]) -> str:
    """Return what was chosen, a line each."""
    return "\n".join(["trainer.auto chose", *(f"  {choice.describe()}" for choice in choices)])
