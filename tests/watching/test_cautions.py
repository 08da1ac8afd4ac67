"""Each caution comes up where its figures say so, and not where they do not."""

import math

import pytest

from finetune.watching.cautions import list_cautions


def log(name, values):
    return [{"step": step, name: value} for step, value in enumerate(values, 1)]


FALLING, FLAT = [3 - 0.1 * step for step in range(20)], [2.0, 2.2, 1.9, 2.1] * 5
PAIRS = [
    {"step": 1, "logps/chosen": -20.0, "rewards/margins": 0.1},
    {"step": 2, "logps/chosen": -25.0, "rewards/margins": 1.0},
]
CASES = {
    "held-out loss rose twice": (log("eval_loss", [2.0, 1.0, 1.1, 1.2]), ["overfitting"]),
    "held-out loss rose once": (log("eval_loss", [2.0, 1.0, 1.1]), []),
    "held-out loss fell again": (log("eval_loss", [2.0, 1.0, 1.1, 1.2, 0.9]), []),
    "loss fell": (log("loss", FALLING), []),
    "loss is flat": (log("loss", FLAT), ["nothing learnt"]),
    "too few logs to tell": (log("loss", FLAT[:8]), []),
    "chosen answers fall too": (PAIRS, ["the chosen answers became less likely too, by 5.0 nats"]),
    "chosen answers rise": ([*PAIRS[:1], {**PAIRS[1], "logps/chosen": -19.0}], []),
    "rewards all equal": (log("reward_std", [0.0, 0.0]), ["nothing learnt: all answers"]),
    "rewards differ once": (log("reward_std", [0.0, 0.1]), []),
    "no number": (log("loss", [1.0, math.nan]), ["loss was no number at step 2"]),
    "nothing was logged": ([], []),
}


@pytest.mark.parametrize("name", CASES)
def test_a_caution_comes_up_where_its_figures_say_so(name):
    lines, expected = CASES[name]
    found = list_cautions(lines)
    assert len(found) == len(expected)
    assert all(caution.text.startswith(text) for caution, text in zip(found, expected, strict=True))
    assert all(caution.advice for caution in found)
