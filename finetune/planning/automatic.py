"""Choose the settings that `trainer.auto` leaves open, so that a recipe fits the device's memory.

The effective batch size stays as it is. With the smallest micro-batch size, the first of these levels that fits is taken: no
gradient checkpointing, gradient checkpointing of every fourth, every second and every layer, activation offloading, an 8-bit paged
optimizer. Then the micro-batch size is raised as far as it fits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.api_arguments import name_option
from finetune.errors import MachineError, RecipeError, TrainingError, describe_count
from finetune.planning.changes import Change, write_setting
from finetune.planning.forecast import Plan, Target, describe_verdict, make_plan
from finetune.recipe.batches import AUTO, read_global_batch
from finetune.recipe.recipe_file import (
    ACCUMULATION,
    BATCH,
    CHECKPOINTING,
    CHECKPOINTING_OPTIONS,
    EVERY_N_LAYERS,
    GLOBAL_BATCH,
)
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.resolved_recipe import ResolvedRecipe

_NO_CHECKPOINTING = {CHECKPOINTING: False}
_CHECKPOINTING = {CHECKPOINTING: True}
_FOURTH, _SECOND = ({**_CHECKPOINTING, CHECKPOINTING_OPTIONS: {EVERY_N_LAYERS: every}} for every in (4, 2))
_OFFLOAD = {**_CHECKPOINTING, "activation_offloading": True}
_PAGED = {**_OFFLOAD, "optim": "paged_adamw_8bit"}
_LEVELS: tuple[tuple[Mapping[str, Any], str], ...] = (
    (_NO_CHECKPOINTING, "all activations stay in memory"),
    (_FOURTH, "gradient checkpointing of every fourth layer"),
    (_SECOND, "gradient checkpointing of every second layer"),
    (_CHECKPOINTING, "gradient checkpointing"),
    (_OFFLOAD, "activations wait in the host's memory"),
    (_PAGED, "optimizer moments in 8 bits, which rounds them, and paged to the host's memory"),
)
DECIDED = (BATCH, ACCUMULATION, CHECKPOINTING_OPTIONS, *_PAGED)


@dataclass(frozen=True)
class Choice:
    """Settings that were chosen, and why; `saves_bytes` is how much lower the peak is than with the choice before."""

    settings: Mapping[str, Any]
    reason: str
    peak_bytes: int
    saves_bytes: int

    def describe(self) -> str:
        """Return the choice as one line for a person."""
        settings = ", ".join(f"{key}: {write_setting(value)}" for key, value in self.settings.items())
        saved = f", saves {self.saves_bytes / 1e9:.2f} GB" if self.saves_bytes > 0 else ""
        return f"{settings}: {self.reason}; peak {self.peak_bytes / 1e9:.2f} GB{saved}"


def choose_settings(resolved: ResolvedRecipe, target: Target) -> tuple[ResolvedRecipe, tuple[Choice, ...]]:
    """Pick micro-batch size, gradient checkpointing, offloading and optimizer for a recipe that says `trainer.auto`.

    The effective batch size and every key that the recipe sets stay. A recipe without `trainer.auto`, or one that sets batch
    sizes and gradient checkpointing itself, is returned unchanged and without choices.

    Raises:
        RecipeError: the effective batch size cannot be split evenly between the processes.
        MachineError: the target does not say how much memory it has.
        TrainingError: no choice fits.
    """
    said = set(resolved.recipe.trainer)
    # With all three keys, as in the recipe of a resumed run, nothing is left to choose.
    if not resolved.recipe.trainer.get(AUTO) or {BATCH, ACCUMULATION, *_NO_CHECKPOINTING} <= said:
        return resolved, ()
    if target.memory_bytes is None:
        raise MachineError(
            f"trainer.auto: say what memory the run has to fit: {name_option('--memory 8GB')}, or {name_option('--gpu NAME')}"
        )
    is_split = {BATCH, ACCUMULATION} <= said
    rows = _count_rows(resolved, target, is_split)
    resolved = _split_rows(resolved, rows, _read_smallest_batch(resolved))
    resolved, plan, choices = _choose_level(resolved, target)
    if is_split:
        return resolved, tuple(choices)
    if BATCH not in said:
        resolved, plan = _grow_batch(resolved, target, plan, rows)
    settings = {key: resolved.recipe.trainer[key] for key in (BATCH, ACCUMULATION)}
    return resolved, (*choices, Choice(settings, f"effective batch size {rows * target.processes}", plan.peak_bytes, 0))


def _read_smallest_batch(resolved: ResolvedRecipe) -> int:
    """Return the micro-batch size to begin with: the recipe's, or the smallest that its method allows."""
    return int(resolved.recipe.trainer.get(BATCH, resolved.method.smallest_batch))


def _count_rows(resolved: ResolvedRecipe, target: Target, is_split: bool) -> int:
    """Return how many rows of an optimizer step each process trains on.

    Raises:
        RecipeError: the recipe contradicts itself, or the rows cannot be split evenly.
    """
    recipe, batch = resolved.recipe, _read_smallest_batch(resolved)
    if is_split:
        rows = batch * int(recipe.trainer[ACCUMULATION])
        if recipe.trainer.get(GLOBAL_BATCH, rows * target.processes) != rows * target.processes:
            raise RecipeError(
                "trainer",
                [
                    f"global_batch: is {recipe.trainer[GLOBAL_BATCH]}, but {BATCH} and {ACCUMULATION} make an effective batch size of "
                    f"{rows * target.processes} with {target.processes} processes; remove one of the two"
                ],
            )
        return rows
    rows, left = divmod(read_global_batch(recipe), target.processes)
    if left or rows % batch:
        raise RecipeError(
            "trainer",
            [
                f"global_batch: {describe_count(read_global_batch(recipe), 'row')} cannot be split evenly between {describe_count(target.processes, 'process', 'processes')} "
                f"with a micro-batch size of {batch}; set a multiple of {target.processes * batch}"
            ],
        )
    return rows


def _split_rows(resolved: ResolvedRecipe, rows: int, batch: int) -> ResolvedRecipe:
    return resolved.change_trainer(**{BATCH: batch, ACCUMULATION: rows // batch})


def _choose_level(resolved: ResolvedRecipe, target: Target) -> tuple[ResolvedRecipe, Plan, list[Choice]]:
    """Return the recipe with the first level that fits, its plan, and every level that was tried.

    Raises:
        TrainingError: no level fits.
    """
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
        f"trainer.auto: {describe_verdict(plan)}, with a micro-batch size of {changed.recipe.trainer[BATCH]} and\n  {choices[-1].describe()}\n"
        "other changes that need less memory\n  "
        + "\n  ".join(change.describe_effect() for change in target.list_changes(changed) if not _is_level(change))
    )


def _is_level(change: Change) -> bool:
    """Tell whether a change is one of the levels, or a smaller micro-batch size; they change only the trainer, not the result."""
    return change.keeps_training and all(key.startswith("trainer.") for key in change.settings)


def _list_levels(resolved: ResolvedRecipe, target: Target) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the levels that agree with the recipe's own keys and that the device can run; without any, one that sets nothing."""
    said, method = resolved.recipe.trainer, resolved.method
    known = read_trainer_options(method.config_module, method.config_class)
    usable = [
        (settings, reason)
        for settings, reason in _LEVELS
        if all(said.get(key, value) == value for key, value in settings.items())
        and ("activation_offloading" not in settings or (target.is_gpu and "activation_offloading" in known))
        and (target.engine != "fsdp2" or "optim" not in settings)
        and not (CHECKPOINTING_OPTIONS in settings and method.toggles_checkpointing)
    ]
    yield from usable or [({}, "as the recipe says")]


def _grow_batch(resolved: ResolvedRecipe, target: Target, plan: Plan, rows: int) -> tuple[ResolvedRecipe, Plan]:
    """Raise the micro-batch size as far as it fits.

    The first step up shows how many bytes a row adds. Larger sizes are tried from the largest that should fit downwards.
    """
    smallest = resolved.recipe.trainer[BATCH]
    larger = [batch for batch in range(smallest + 1, rows + 1) if rows % batch == 0]
    if not larger or plan.memory_bytes is None:
        return resolved, plan
    second = _split_rows(resolved, rows, larger[0])
    planned = make_plan(second, target)
    if not planned.fits:
        return resolved, plan
    row_bytes = max((planned.peak_bytes - plan.peak_bytes) // (larger[0] - smallest), 1)
    largest = smallest + (plan.memory_bytes - plan.peak_bytes) // row_bytes
    for batch in sorted((batch for batch in larger[1:] if batch <= largest), reverse=True):
        grown = _split_rows(resolved, rows, batch)
        attempt = make_plan(grown, target)
        if attempt.fits:
            return grown, attempt
    return second, planned


def describe_choices(choices: tuple[Choice, ...]) -> str:
    """Return the choices as text, one a line."""
    return "\n".join(["trainer.auto chose", *(f"  {choice.describe()}" for choice in choices)])
