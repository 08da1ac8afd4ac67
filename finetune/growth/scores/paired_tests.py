"""Test whether a score changed from one checkpoint to another, from the same samples of both.

Source: McNemar, Psychometrika 12 (1947), in its exact form; Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 16;
the two-proportion test is the usual one with a pooled standard error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy

SIGNIFICANCE = 0.05
_DRAWS, _SEED = 10_000, 20_241_223
_NUMBERS_AT_ONCE = 1 << 23
_NORMAL_95 = 1.959964  # 95 % of a normal distribution lie within so many standard errors

TestName = Literal["McNemar, exact", "paired bootstrap", "paired t", "two proportions, unpaired"]


@dataclass(frozen=True)
class StepTest:
    """The test of one step; `change` is later minus earlier, in the unit of the score. `p` is two-sided.

    `low` and `high` bound the change at 95 %, for tests that give such bounds, and `stderr` is its standard error. `gained` and `lost` count the samples that became right and
    wrong, where each is either.
    """

    test: TestName
    change: float
    p: float
    low: float | None = None
    high: float | None = None
    gained: int | None = None
    lost: int | None = None
    stderr: float | None = None

    @property
    def is_real(self) -> bool:
        """Whether the change is larger than chance makes it, at `SIGNIFICANCE`."""
        return self.p < SIGNIFICANCE


def compare_right_and_wrong(before: Sequence[bool], after: Sequence[bool]) -> StepTest:
    """Compare which samples were right, by the exact test of McNemar; the change is in percent of all samples."""
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    count = len(before)
    change = 100 * (gained - lost) / count
    error = 100 * math.sqrt((gained + lost - (gained - lost) ** 2 / count) / count / max(1, count - 1))
    return StepTest("McNemar, exact", change, _binomial_p(gained, lost), gained=gained, lost=lost, stderr=error)


def _binomial_p(gained: int, lost: int) -> float:
    """Return the two-sided probability of a division of coin throws that is at least as uneven."""
    throws = gained + lost
    tail = sum(math.comb(throws, count) for count in range(min(gained, lost) + 1))
    # Whole numbers, divided once: powers of 2 are too large for a float at a thousand throws.
    share: float = 2 * tail / 2**throws
    return min(1.0, share)


def resample_means(values: numpy.ndarray, weights: numpy.ndarray | None = None) -> numpy.ndarray:
    """Return the means of resampled rows for each checkpoint, the same rows for all: (draws, checkpoints) of (rows, checkpoints).

    With `weights` (rows) the mean is the sum of the values over the sum of the weights, as in bits per byte. The seed is fixed.
    """
    rows = len(values)
    generator = numpy.random.default_rng(_SEED)
    below = numpy.ones(rows) if weights is None else weights
    columns = numpy.column_stack([values, below]).astype(numpy.float64)
    found, step = [], max(1, _NUMBERS_AT_ONCE // rows)
    for start in range(0, _DRAWS, step):
        count = min(step, _DRAWS - start)
        drawn = generator.integers(0, rows, (count, rows))
        offsets = numpy.arange(count)[:, None] * rows
        times = numpy.bincount((drawn + offsets).ravel(), minlength=count * rows).reshape(count, rows)
        sums = times @ columns
        # A resample of rows without any weight has no mean; the weights of real rows are above 0.
        found.append(sums[:, :-1] / sums[:, -1:])
    return numpy.concatenate(found)


def compare_means(change: float, before: numpy.ndarray, after: numpy.ndarray, rows: int) -> StepTest:
    """Compare two means by the resampled means of both (draws), which were made of the same `rows` rows; `change` is the observed one.

    Of a few rows that all rose, every resample rose too. So p is at least that of so many coin throws with the same side up.
    """
    differences = after - before
    low, high = numpy.percentile(differences, (2.5, 97.5))
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    p = min(1.0, max(2 * (min(below, above) + 1) / (len(differences) + 1), 2.0 ** (1 - rows)))
    return StepTest("paired bootstrap", change, p, float(low), float(high), stderr=float(differences.std()))


def compare_pairs(before: Sequence[float], after: Sequence[float]) -> StepTest:
    """Compare two or more pairs of numbers, such as the losses of two recipes by seed, by Student's t of their differences."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    count, change = len(differences), sum(differences) / len(differences)
    squares = sum((difference - change) ** 2 for difference in differences)
    error = math.sqrt(squares / (count - 1) / count)
    p = _student_p(change / error, count - 1) if error else float(change == 0)
    return StepTest("paired t", change, p, stderr=error)


def _student_p(t: float, freedom: int) -> float:
    """Return the two-sided probability of Student's t with `freedom` degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    is_odd = freedom % 2 == 1
    term, total = (math.cos(angle), 0.0) if is_odd else (1.0, 0.0)
    for number in range(2 if is_odd else 1, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * number / (number + 1)
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if is_odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1.0 - inside))


def compare_shares(before: float, after: float, rows: int) -> StepTest:
    """Compare two published percentages of the same number of rows, as if the rows were drawn anew for each.

    Which samples were right is not published, so this is not a paired test. It finds fewer real changes than one.
    """
    pooled = (before + after) / 200
    error = 100 * math.sqrt(2 * pooled * (1 - pooled) / rows)
    change = after - before
    if error == 0:
        return StepTest("two proportions, unpaired", change, 1.0)
    p = math.erfc(abs(change) / error / math.sqrt(2))
    spread = _NORMAL_95 * math.hypot(share_error(before, rows), share_error(after, rows))
    return StepTest("two proportions, unpaired", change, p, change - spread, change + spread)


def share_error(percent: float, rows: int) -> float:
    """Return the standard error of a percentage of right rows, in percent."""
    return math.sqrt(percent * (100 - percent) / rows)


def find_level_spans(tests: Sequence[Sequence[StepTest | None]]) -> list[tuple[int, int]]:
    """Return the longest spans of at least two checkpoints within which no two differ really, as (first, last).

    `tests[i][j]` compares checkpoint i with the later checkpoint j; None, where they cannot be compared, ends a span.
    """
    spans: list[tuple[int, int]] = []
    for first in range(len(tests)):
        last = first
        while last + 1 < len(tests) and all(
            (test := tests[inner][last + 1]) is not None and not test.is_real for inner in range(first, last + 1)
        ):
            last += 1
        if last > first and (not spans or spans[-1][1] < last):
            spans.append((first, last))
    return spans
