"""Plan the learning-rate schedule of a pre-training run."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from finetune.errors import RecipeError
from finetune.recipe.sections import ScheduleSection

_DECAYS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
DECAYS = tuple(_DECAYS)


def compute_warmup(step: int, steps: int) -> float:
    """Return the factor of a linear warm-up: 0 at step 0, 1 from step `steps` on."""
    return 1.0 if steps <= 0 else min(1.0, max(0, step) / steps)


def compute_decay(kind: str, step: int, start: int, end: int) -> float:
    """Return the factor of a decay: 1 until `start`, 0 from `end` on; `step` counts the updates already made.

    Raises:
        ValueError: `kind` is not one of `DECAYS`, or the range is empty.
    """
    if kind not in _DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}; found {kind!r}")
    if end <= start:
        raise ValueError(f"a decay must end after it starts; found {start} to {end}")
    return _DECAYS[kind](min(1.0, max(0.0, (step - start) / (end - start))))


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `steps` updates; warm-up and decay count updates from `first`, the number of the run's first one."""

    steps: int
    first: int = 0
    warmup: int = 0
    decay: str = "none"
    decay_start: int = 0
    decay_end: int = 0

    def compute_factor(self, done: int) -> float:
        """Return the factor of the learning rate for the update after `done` ones of this run."""
        factor = compute_warmup(self.first + done, self.warmup)
        if self.decay == "none":
            return factor
        return factor * compute_decay(self.decay, self.first + done, self.decay_start, self.decay_end)


def plan_schedule(section: ScheduleSection, tokens_per_step: int, steps_of_data: int, step_of_states: int) -> Schedule:
    """Turn a recipe's section into a schedule; without `length` the run lasts one pass over the data.

    Raises:
        RecipeError: the decay ends before the run begins, or before the decay starts.
    """

    def to_steps(number: float) -> int:
        return math.ceil(number / tokens_per_step) if section.unit == "tokens" else int(number)

    steps = steps_of_data if section.length is None else to_steps(section.length)
    first = step_of_states if section.count == "states" else 0
    warmup = to_steps(section.warmup)
    start = max(warmup, first) if section.decay_start is None else to_steps(section.decay_start)
    end = first + steps if section.decay_end is None else to_steps(section.decay_end)
    decays = section.decay not in ("none", "auto")
    if decays and end <= max(start, first):
        raise RecipeError(
            "schedule",
            [
                f"the decay from step {start:,} to step {end:,} is empty, or ends before this run begins (step {first:,}); "
                "set decay_start and decay_end within the run, or count: run"
            ],
        )
    return Schedule(max(1, steps), first, warmup, section.decay if decays else "none", start, end)
