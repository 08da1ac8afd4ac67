"""The learning-rate schedule of a pre-training run, in its own steps."""

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
    """Return the factor that rises from 0 at step 0 to 1 at step `steps`, and stays there."""
    return 1.0 if steps <= 0 else min(1.0, max(0, step) / steps)


def compute_decay(kind: str, step: int, start: int, end: int) -> float:
    """Return the factor that is 1 until `start` and 0 from `end` on; `step` counts the updates already made.

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
    """A run of `steps` updates, the first of them number `first` of its count; the range of the decay is in that count."""

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
    """Return what a recipe's section means; without a length the run takes the data once.

    Raises:
        RecipeError: the decay is over before the run begins, or ends before it starts.
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
                f"the decay from step {start:,} to {end:,} is over when this run begins (step {first:,}), or never lasts; "
                "set decay_start and decay_end within the run, or count: run"
            ],
        )
    return Schedule(max(1, steps), first, warmup, section.decay if decays else "none", start, end)
