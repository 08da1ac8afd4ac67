"""Read from the metrics of a run what a person should be warned of, and what to do about it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

Lines = Sequence[Mapping[str, Any]]
_RISES = 2  # evaluations in a row above the best one
_FEWEST_LOGS = 12
_LOST_LIKELIHOOD = 1.0  # nats an answer by which the chosen answers may become less likely


@dataclass(frozen=True)
class Caution:
    """A warning about a run, and what to do."""

    text: str
    advice: str


def list_cautions(lines: Lines) -> tuple[Caution, ...]:
    """Return the warnings that the logged lines of a run give rise to."""
    return tuple(caution for look in _LOOKS for caution in look(lines))


def read_series(lines: Lines, name: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric; what is no finite number is left out."""
    return [(line["step"], line[name]) for line in lines if is_number(line.get(name))]


def collect_series(lines: Lines) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of all metrics by name, in one pass over the lines; what is no finite number is left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        step = line["step"]
        for name, value in line.items():
            if is_number(value):
                series.setdefault(name, []).append((step, value))
    return series


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _find_overfitting(lines: Lines) -> Iterator[Caution]:
    losses = read_series(lines, "eval_loss")
    if not losses:
        return
    best = min(range(len(losses)), key=lambda place: losses[place][1])
    rises = len(losses) - 1 - best
    if rises < _RISES:
        return
    step, lowest = losses[best]
    yield Caution(
        f"overfitting: the held-out loss was lowest at step {step:,} ({lowest:.3f}), and {rises} evaluations since were higher "
        f"(now {losses[-1][1]:.3f})",
        "train for fewer epochs, add rows, or keep the best weights: trainer.load_best_model_at_end: true",
    )


def _find_no_learning(lines: Lines) -> Iterator[Caution]:
    losses = [value for _, value in read_series(lines, "loss")]
    if len(losses) < _FEWEST_LOGS:
        return
    quarter = len(losses) // 4
    first, last = losses[:quarter], losses[-quarter:]
    noise = 2 * math.sqrt((stdev(first) ** 2 + stdev(last) ** 2) / quarter)
    if mean(last) < mean(first) - noise:
        return
    yield Caution(
        f"nothing learnt: the training loss of the last quarter ({mean(last):.3f}) is not below that of the first "
        f"({mean(first):.3f}) by more than chance (two standard errors are {noise:.3f})",
        "look at the rows with finetune preview, and try another trainer.learning_rate",
    )


def _find_lost_likelihood(lines: Lines) -> Iterator[Caution]:
    chosen, margins = read_series(lines, "logps/chosen"), read_series(lines, "rewards/margins")
    if len(chosen) < 2 or not margins or margins[-1][1] <= 0:
        return
    lost = chosen[0][1] - chosen[-1][1]
    if lost <= _LOST_LIKELIHOOD:
        return
    yield Caution(
        f"the chosen answers became less likely too, by {lost:.1f} nats an answer: the margin grows because the rejected ones fall "
        "faster",
        "raise trainer.beta, lower trainer.learning_rate, or begin with supervised training on the chosen answers",
    )


def _find_equal_rewards(lines: Lines) -> Iterator[Caution]:
    spreads = [value for _, value in read_series(lines, "reward_std")]
    if not spreads or any(spreads):
        return
    yield Caution(
        "nothing learnt: all answers to a prompt got equal rewards at every logged step, so no answer is better than another",
        "take rules that tell the answers apart, or raise trainer.temperature",
    )


def _find_bad_numbers(lines: Lines) -> Iterator[Caution]:
    for line in lines:
        for name in ("loss", "grad_norm", "eval_loss"):
            if isinstance(line.get(name), float) and not math.isfinite(line[name]):
                yield Caution(
                    f"{name} was no number at step {line['step']:,}",
                    "continue from an earlier checkpoint with a lower trainer.learning_rate",
                )
                return


_LOOKS: tuple[Callable[[Lines], Iterator[Caution]], ...] = (
    _find_bad_numbers,
    _find_overfitting,
    _find_no_learning,
    _find_lost_likelihood,
    _find_equal_rewards,
)
