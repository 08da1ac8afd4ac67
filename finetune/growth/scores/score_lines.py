"""The scores of many checkpoints, one line for each score, with tests of every pair of checkpoints on the same samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy

from finetune.checkpoints.checkpoint_table import SCORED_ROWS, Checkpoint
from finetune.evaluation.tasks.run_tasks import PreparedTask
from finetune.evaluation.tasks.task_forms import Figure, Measure, Protocol, Sample
from finetune.evaluation.tasks.task_results import Evaluation, SampleFile
from finetune.growth.scores.paired_tests import (
    StepTest,
    compare_means,
    compare_right_and_wrong,
    compare_shares,
    find_level_spans,
    resample_means,
    share_error,
)

# Published by the authors, measured here, or measured here after the same fine-tuning of each.
Origin = Literal["published", "measured", "tuned"]
Pair = tuple[int, int]
_PER_CENT, _BITS = "%", "bits/byte"
# The protocol that the published scores are taken to come from.
PUBLISHED_PROTOCOL: Protocol = "authors"


@dataclass(frozen=True)
class ScoreLine:
    """One score of every checkpoint, None where a checkpoint has none.

    `tests` holds the test of each pair of checkpoints (earlier, later) by their numbers. They are of the quantity `tested`, which is the
    score itself or what it is computed from, and their changes are in `test_unit`.
    """

    task: str
    measure: str
    origin: Origin
    unit: str
    tested: str
    test_unit: str
    rows: int
    figures: tuple[Figure | None, ...]
    tests: Mapping[Pair, StepTest]
    is_better_high: bool = True

    @property
    def name(self) -> str:
        """The name of the score with the name of its task."""
        return f"{self.task} {self.measure}"

    def find_step(self, number: int) -> StepTest | None:
        """Return the test of a checkpoint against the one before it."""
        return self.tests.get((number - 1, number))

    def describe_steps(self, names: Sequence[str]) -> Iterator[str]:
        """Yield a sentence for each span of checkpoints without a real change, and for each step with one."""
        count = len(self.figures)
        table = [[self.tests.get((first, last)) for last in range(count)] for first in range(count)]
        subject = f"{self.task} {self.tested} ({self.origin})"
        for first, last in find_level_spans(table):
            yield f"{names[first]} to {names[last]}: {subject} no real change"
        for number in range(1, count):
            step = self.find_step(number)
            if step is not None and step.is_real:
                verb = "rises" if step.change > 0 else "falls"
                amount = f"{abs(step.change):.3g} {self.test_unit}"
                yield f"{names[number - 1]} to {names[number]}: {subject} {verb} by {amount} ({describe_p(step.p)})"

    def describe_best(self, names: Sequence[str]) -> str:
        """Return a sentence that names the checkpoint with the best score, and those that are not really worse."""
        values = [(figure.value, number) for number, figure in enumerate(self.figures) if figure is not None]
        _, best = max(values) if self.is_better_high else min(values)
        pairs = ((number, self.tests.get((min(number, best), max(number, best)))) for _, number in values)
        as_good = [names[number] for number, test in pairs if test is not None and not test.is_real]
        beside = f"; not really worse: {', '.join(as_good)}" if as_good else "; every other is really worse"
        return f"{self.name} ({self.origin}) is best from {names[best]}{beside if len(values) > 1 else ''}"


def describe_p(p: float) -> str:
    """Return a probability for a person."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def make_published_lines(rows: Sequence[Checkpoint | None], tasks: Mapping[str, str]) -> list[ScoreLine]:
    """Return the published scores of checkpoints in `tasks` (name, and the measure that they stand beside)."""
    lines = []
    for task, measure in tasks.items():
        scores = [None if row is None else row.scores.get(task) for row in rows]
        if not any(score is not None for score in scores):
            continue
        count = SCORED_ROWS[task]
        figures = tuple(None if score is None else Figure(score, share_error(score, count)) for score in scores)
        tests = {
            (first, last): compare_shares(before, after, count)
            for (first, before), (last, after) in combinations(enumerate(scores), 2)
            if before is not None and after is not None
        }
        lines.append(ScoreLine(task, measure, "published", _PER_CENT, measure, "points", count, figures, tests))
    return lines


def list_published_measures(prepared: Sequence[PreparedTask]) -> dict[str, str]:
    """Return for each task the measure that a published score is compared with."""
    return {one.form.task: measure.name for one in prepared for measure in one.form.measures if measure.is_published}


def make_measured_lines(
    prepared: Sequence[PreparedTask], evaluations: Sequence[Evaluation], origin: Origin
) -> list[ScoreLine]:
    """Return the scores that evaluations of the same rows gave, in the order of the checkpoints."""
    lines = []
    for one in prepared:
        results = [evaluation.tasks[one.form.task] for evaluation in evaluations]
        files = [SampleFile(Path(result.file)).samples for result in results]
        samples = [[kept[row] for row in range(one.asked)] for kept in files]
        for measure in one.form.measures:
            figures = [Figure(result.metric[measure.name], result.stderr[measure.name]) for result in results]
            lines.append(_compare(one, measure, origin, figures, samples))
        if one.form.generation is not None:
            lines.append(_compare_bits(one, origin, samples))
    return lines


def _compare(
    one: PreparedTask,
    measure: Measure,
    origin: Origin,
    figures: Sequence[Figure],
    samples: Sequence[Sequence[Sample]],
) -> ScoreLine:
    factor = measure.percent or 1.0
    scaled = tuple(
        Figure(factor * figure.value, None if figure.stderr is None else factor * figure.stderr) for figure in figures
    )
    values = [[sample[measure.field] for sample in kept] for kept in samples]
    if measure.is_right_or_wrong:
        tests = {
            (first, last): compare_right_and_wrong(before, after)
            for (first, before), (last, after) in combinations(enumerate(values), 2)
        }
    else:
        share = 1.0 if measure.percent is None else 100.0
        tests = _test_means(numpy.array(values, dtype=numpy.float64).T * share)
    unit, tested, test_unit = (
        ("", "log-likelihood", "nats") if measure.percent is None else (_PER_CENT, measure.name, "points")
    )
    return ScoreLine(
        one.form.task,
        measure.name,
        origin,
        unit,
        tested,
        test_unit,
        one.asked,
        scaled,
        tests,
        measure.percent is not None,
    )


def _compare_bits(one: PreparedTask, origin: Origin, samples: Sequence[Sequence[Sample]]) -> ScoreLine:
    """Compare the bits per byte of the gold answers."""
    bits = numpy.array([[sample["gold_bits"] for sample in kept] for kept in samples], dtype=numpy.float64).T
    sizes = numpy.array([sample["gold_bytes"] for sample in samples[0]], dtype=numpy.float64)
    tests = _test_means(bits, sizes)
    errors = resample_means(bits, sizes).std(axis=0, ddof=1)
    means = bits.sum(axis=0) / sizes.sum()
    figures = tuple(
        Figure(float(mean), float(error) if one.asked > 1 else None) for mean, error in zip(means, errors, strict=True)
    )
    return ScoreLine(one.form.task, _BITS, origin, "", _BITS, "bits", one.asked, figures, tests, False)


def _test_means(values: numpy.ndarray, weights: numpy.ndarray | None = None) -> dict[Pair, StepTest]:
    """Test all pairs of the means of (rows, checkpoints)."""
    total = len(values) if weights is None else weights.sum()
    means, drawn = values.sum(axis=0) / total, resample_means(values, weights)
    return {
        (first, last): compare_means(float(means[last] - means[first]), drawn[:, first], drawn[:, last], len(values))
        for first, last in combinations(range(values.shape[1]), 2)
    }
