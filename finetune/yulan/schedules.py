"""Learning-rate factors over a stated range of steps: `start` is the first step of the range, `end` its last."""

import math
from collections.abc import Callable

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
