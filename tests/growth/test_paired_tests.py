"""The tests of a step: exact values, analytic ones, and what they say of the published table."""

import math

import numpy
import pytest

from finetune.cli.main import main
from finetune.growth.published_scores import compare_published
from finetune.growth.scores.paired_tests import (
    StepTest,
    compare_means,
    compare_right_and_wrong,
    compare_shares,
    find_level_spans,
    resample_means,
)


def compare(gained, lost, same):
    before = [False] * gained + [True] * lost + [True] * same
    after = [True] * gained + [False] * lost + [True] * same
    return compare_right_and_wrong(before, after)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),  # two tails of more than a half
        (5, 0, 2 / 2**5),
        (0, 6, 2 / 2**6),
        (8, 1, 2 * (1 + 9) / 2**9),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
    ],
)
def test_mcnemar_is_that_of_coin_throws(gained, lost, p):
    found = compare(gained, lost, 4)
    assert found.p == pytest.approx(p, rel=1e-12)
    assert (found.gained, found.lost) == (gained, lost)
    assert found.change == pytest.approx(100 * (gained - lost) / (gained + lost + 4))


def test_mcnemar_of_many_samples_is_near_the_normal_one():
    """2 ** 1100 is no float."""
    found = compare(600, 500, 4000)
    z = (100 - 1) / math.sqrt(1100)  # with the correction for whole numbers
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert found.is_real


def test_resampled_means_have_the_standard_error_of_the_mean():
    values = numpy.random.default_rng(1).normal(3.0, 2.0, (400, 2))
    drawn = resample_means(values)
    assert drawn.shape == (10_000, 2)
    assert drawn.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=0.01)
    assert drawn.std(axis=0) == pytest.approx(values.std(axis=0) / 20, rel=0.03)
    assert (resample_means(values) == drawn).all()
    weights = numpy.random.default_rng(2).uniform(1, 3, 400)
    assert resample_means(values, weights).mean(axis=0) == pytest.approx(values.sum(0) / weights.sum(), abs=0.01)


def test_the_paired_bootstrap_uses_the_same_rows_of_both():
    """Rows differ much from one another, and the second checkpoint is a little better on each: unpaired, nothing would be seen."""
    rows = numpy.random.default_rng(3).normal(-20, 8, 200)
    better = rows + numpy.random.default_rng(4).normal(0.3, 0.5, 200)
    drawn = resample_means(numpy.column_stack([rows, better]))
    change = float((better - rows).mean())
    found = compare_means(change, drawn[:, 0], drawn[:, 1], 200)
    assert found.p < 0.001
    error = float((better - rows).std(ddof=1)) / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx((change - 1.96 * error, change + 1.96 * error), abs=0.1 * error)
    apart = resample_means(better[::-1, None])
    assert compare_means(change, drawn[:, 0], apart[:, 0], 200).p > 0.3
    assert compare_means(0.0, drawn[:, 0], drawn[:, 0], 200).p == 1.0


@pytest.mark.parametrize(("rows", "p"), [(1, 1.0), (2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_a_few_rows_that_all_rose_prove_little(rows, p):
    """Every resample of them rises, which once gave p = 0.0002 for a single row."""
    values = numpy.column_stack([numpy.zeros(rows), numpy.arange(1.0, rows + 1)])
    drawn = resample_means(values)
    assert compare_means(float(values[:, 1].mean()), drawn[:, 0], drawn[:, 1], rows).p == p


def test_published_shares_are_compared_as_two_draws():
    found = compare_shares(21.39, 29.94, 1319)
    pooled = 0.25665
    z = 0.0855 / math.sqrt(pooled * (1 - pooled) * 2 / 1319)
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-9)
    error = 100 * math.sqrt((0.2139 * 0.7861 + 0.2994 * 0.7006) / 1319)
    assert (found.low, found.high) == pytest.approx((8.55 - 1.96 * error, 8.55 + 1.96 * error), abs=1e-3)
    assert compare_shares(0.0, 0.0, 10).p == 1.0


def test_spans_are_the_longest_without_a_real_change():
    level, real = StepTest("paired bootstrap", 0.0, 0.5), StepTest("paired bootstrap", 1.0, 0.01)
    pairs = {(0, 1): level, (1, 2): level, (0, 2): real, (2, 3): level, (1, 3): level, (0, 3): real, (3, 4): real}
    table = [[pairs.get((first, last)) for last in range(5)] for first in range(5)]
    assert find_level_spans(table) == [(0, 1), (1, 3)]


def test_the_published_table_says_what_the_issue_says(capsys):
    names = ["phase5", "phase10", "phase15", "phase20", "phase25", "base-4k", "base"]
    found = compare_published(names)
    assert "phase10 to phase25: lambada score (published) no real change" in found.sentences
    assert "phase15 to phase20: gsm8k score (published) rises by 7.58 points (p < 0.001)" in found.sentences
    with pytest.raises(SystemExit) as ended:
        main(["dynamics", *names, "--published"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["dynamics", *names, "--published", "-o", "never"])
    assert ended.value.code == 2
    assert "leave the other options out" in capsys.readouterr().err
    assert "phase10      400 B      55.00  0.69   +1.15    0.241" in out
    assert "base        1.08 T      65.67  0.66   +0.95    0.311" in out
    with pytest.raises(SystemExit) as ended:
        main(["dynamics", "phase5", "instruct", "--published"])
    assert ended.value.code == 2
    assert "instruct: has no published score; those that have are phase5, phase10" in capsys.readouterr().err
