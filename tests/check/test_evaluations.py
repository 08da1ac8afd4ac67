"""Options that need evaluations: each contradiction is said by its key, and none is left for transformers to refuse in its own words."""

import itertools

import pytest
from transformers import TrainingArguments

from finetune.check.trainer.evaluations import check_evaluations
from finetune.recipe.sections import DataSection

BEST = {"load_best_model_at_end": True}


@pytest.mark.parametrize("with_best", [True, False])
def test_whatever_transformers_refuses_is_said_before(tmp_path, with_best):
    """A recipe without `save_strategy` that evaluates by epoch ended in transformers' words on `--load_best_model_at_end`."""
    refused = 0
    words = (
        ("no", "steps", "epoch"),
        ("no", "steps", "epoch", "best", None),
        ("linear", "reduce_lr_on_plateau", "greedy"),
    )
    for evaluates, saves, schedule in itertools.product(*words):
        for evaluate_steps, save_steps in ((2, 2), (2, 3), (0.5, 2), (0.25, 0.25)):
            options = {
                "eval_strategy": evaluates,
                "lr_scheduler_type": schedule,
                **({"save_strategy": saves} if saves else {}),
            }
            options |= {"eval_steps": evaluate_steps, "save_steps": save_steps, **(BEST if with_best else {})}
            problems = list(check_evaluations(options, DataSection(held_out=4)))
            try:
                TrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model=None, **options)
            except ValueError:
                refused += 1
                assert problems, options
            assert all(problem.partition(":")[0].removeprefix("trainer.") in options for problem in problems)
    assert refused > 20


@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        (BEST, DataSection(held_out=4), "trainer.load_best_model_at_end: the best step can be one whose weights are not saved, since eval_strategy is epoch and save_strategy steps (the default); set both to the same word, or save_strategy: best"),
        (BEST | {"save_strategy": "no", "eval_strategy": "epoch"}, DataSection(held_out=4), "eval_strategy is epoch and save_strategy no; set both"),
        (BEST | {"save_strategy": "best"}, DataSection(held_out=4), None),
        ({"save_strategy": "best"}, DataSection(held_out=4), "trainer.save_strategy: best needs to know by what; set trainer.metric_for_best_model"),
        ({"save_strategy": "best", "eval_strategy": "no", "metric_for_best_model": "loss"}, DataSection(held_out=4), "trainer.save_strategy: needs evaluations"),
        ({"save_strategy": "best"}, DataSection(), "trainer.save_strategy: needs held-out rows"),
        ({"eval_on_start": True}, DataSection(), "trainer.eval_on_start: needs held-out rows"),
        ({"eval_on_start": True, "eval_strategy": "no"}, DataSection(held_out=4), None),
        ({"eval_strategy": "steps"}, DataSection(), "trainer.eval_strategy: needs held-out rows to measure; set data.eval or data.held_out, or remove this key"),
        ({"lr_scheduler_type": "greedy"}, DataSection(), "trainer.lr_scheduler_type: needs held-out rows"),
    ],
)  # fmt: skip
def test_contradictions_are_said_by_their_key(options, data, said):
    problems = list(check_evaluations(options, data))
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]
