"""Check the sections optimizer and schedule of the methods `pretrain` and `anneal`, and fill in what `auto` stands for.

This module never imports torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune.files.folders import expand_home
from finetune.recipe.methods import METHODS, Pretraining
from finetune.recipe.sections import OptimizerSection, Recipe, ScheduleSection

_STATES = ("published", "fresh")


def check_pretraining(recipe: Recipe, pretraining: Pretraining, folder: Path) -> Iterator[str]:
    """Yield the problems of the sections optimizer and schedule, and of settings that do not fit packed rows.

    The folder of an optimizer state is looked for in the recipe's folder, `folder`, first.
    """
    yield from _check_rows(recipe)
    if recipe.adapter.loraplus_ratio is not None:
        yield f"adapter.loraplus_ratio: has no effect on {recipe.method}, whose optimizer the section optimizer sets; remove it"
    resolved = resolve_pretraining(recipe, pretraining, folder)
    yield from _check_optimizer(recipe, resolved.optimizer.states)
    yield from _check_schedule(resolved.schedule, resolved.optimizer.states)


def check_unused(optimizer: OptimizerSection, schedule: ScheduleSection) -> Iterator[str]:
    """Yield the keys of these sections that a recipe sets although its method does not read them."""
    names = " and ".join(name for name, method in METHODS.items() if method.is_pretraining)
    for section, values, default in (
        ("optimizer", optimizer, OptimizerSection()),
        ("schedule", schedule, ScheduleSection()),
    ):
        for key, value in vars(values).items():
            if value != vars(default)[key]:
                yield f"{section}.{key}: works only for the methods {names}; remove it, or set one of these methods"


def _check_rows(recipe: Recipe) -> Iterator[str]:
    if recipe.data.overflow != "error":
        yield "data.overflow: has no effect on packed rows, where a long document continues in the next row; remove it"
    for key in ("max_positions", "rope_theta"):
        value = getattr(recipe.model, key)
        if value is not None and value <= 0:
            yield f"model.{key}: must be above 0; found {value}"


def _check_optimizer(recipe: Recipe, states: str) -> Iterator[str]:
    optimizer, is_fresh = recipe.optimizer, states == "fresh"
    if not is_fresh and states != "published" and not expand_home(states).is_dir():
        yield f"optimizer.states: there is no folder {states}; give a folder, or one of {', '.join(_STATES)}"
    if not is_fresh and recipe.model.architecture != "native":
        yield (
            f"optimizer.states: {states} needs the native architecture; "
            "set model.architecture: native, or optimizer.states: fresh"
        )
    if not is_fresh and not recipe.adapter.trains_all_weights:
        yield (
            f"optimizer.states: {states} needs a run that trains all weights; set adapter.kind: none, or optimizer.states: fresh"
        )
    for key in ("learning_rate", "weight_decay"):
        value = getattr(optimizer, key)
        if value is not None and not is_fresh:
            yield f"optimizer.{key}: comes from the optimizer state; remove it, or set optimizer.states: fresh"
        elif value is not None and value < 0:
            yield f"optimizer.{key}: must be at least 0; found {value}"
    is_plain = recipe.model.architecture != "native" or not recipe.adapter.trains_all_weights
    if is_fresh and is_plain and optimizer.learning_rate is None:
        yield (
            "optimizer.learning_rate: is missing; the published one suits only all weights of the native architecture "
            "(2e-5 to 2e-4 is usual for all weights of a folded model, 1e-4 to 2e-4 for an adapter)"
        )
    if optimizer.save_states and (recipe.model.architecture != "native" or not recipe.adapter.trains_all_weights):
        yield (
            "optimizer.save_states: needs a run that trains all weights of the native architecture; set "
            "model.architecture: native and adapter.kind: none, or remove this key"
        )


def _check_schedule(schedule: ScheduleSection, states: str) -> Iterator[str]:
    for key in ("length", "warmup", "decay_start", "decay_end"):
        value = getattr(schedule, key)
        if value is None:
            continue
        if value < 0 or (key == "length" and value == 0):
            yield f"schedule.{key}: must be above 0; found {value}"
        elif schedule.unit == "steps" and value != int(value):
            yield f"schedule.{key}: must be a whole number of steps; found {value}"
        if key.startswith("decay") and schedule.decay == "none":
            yield f"schedule.{key}: has no effect where schedule.decay is none; remove it"
    start, end = schedule.decay_start, schedule.decay_end
    if start is not None and end is not None and end <= start:
        yield f"schedule.decay_end: must lie after decay_start; found {start} to {end}"
    if schedule.count == "states" and schedule.unit == "tokens":
        yield "schedule.count: an optimizer state counts steps, not tokens; set schedule.unit: steps, or count: run"
    if schedule.count == "states" and states == "fresh":
        yield "schedule.count: a fresh optimizer has no steps to count from; remove it, or set optimizer.states"


def resolve_pretraining(recipe: Recipe, pretraining: Pretraining, folder: Path) -> Recipe:
    """Return the recipe with the values that `auto` stands for, and with an absolute path of the optimizer state's folder."""
    states, decay = recipe.optimizer.states, recipe.schedule.decay
    if states == "auto":
        states = pretraining.states
    elif states not in _STATES:
        candidates = (folder / expand_home(states), expand_home(states))
        states = next((str(path.resolve()) for path in candidates if path.is_dir()), states)
    optimizer = replace(recipe.optimizer, states=states)
    return replace(
        recipe,
        optimizer=optimizer,
        schedule=replace(recipe.schedule, decay=pretraining.decay if decay == "auto" else decay),
    )
