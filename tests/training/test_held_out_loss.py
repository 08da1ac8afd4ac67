"""The held-out loss of a run is the mean over trained tokens, or pairs: what `finetune evaluate` gives, for every batch."""

import json
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch

from finetune.evaluation.pairs import evaluate_pairs
from finetune.evaluation.token_loss import evaluate_path
from finetune.files.resources import find_demo_data
from finetune.models.row_loss import estimate_error
from finetune.recipe.methods import METHODS
from finetune.training.held_out_loss import _count_own_rows, _RowMean, _TokenMean

EVALUATE = ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.max_steps=2"]


def read_held_out(run, name="eval_loss"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line][-1]


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.per_device_eval_batch_size=1"],
        # Only the rows of the trial before step 1 were evaluated.
        [
            "trainer.per_device_eval_batch_size=3",
            "trainer.dataloader_num_workers=1",
            "trainer.dataloader_persistent_workers=true",
        ],
        # The last batch was dropped, which is meant for training.
        ["trainer.per_device_eval_batch_size=3", "trainer.dataloader_drop_last=true"],
        ["trainer.per_device_eval_batch_size=3", "trainer.padding_free=true", "model.attention=eager"],
    ],
    ids=["1", "workers", "drop_last", "padding_free"],
)
def test_a_run_measures_what_evaluate_does(train, tmp_path, settings):
    """Before, this recipe gave 8.345, 8.407 and 8.385 for evaluation batches of 4, 2 and 1 rows."""
    run = train("run", *EVALUATE, *settings)
    expected = evaluate_path(str(run), [tmp_path / "held.jsonl"], 128)
    assert read_held_out(run) == pytest.approx(expected.loss, abs=1e-5)
    if settings == ["trainer.per_device_eval_batch_size=1"]:  # each batch is a row, as in `evaluate`
        assert (
            read_held_out(run, "eval_loss_stderr") == pytest.approx(expected.stderr, abs=1e-5) and expected.stderr > 0
        )


def count(rank, remainder):
    return _count_own_rows(SimpleNamespace(gradient_state=state(remainder), num_processes=2, process_index=rank), 4)


def state(remainder):
    return SimpleNamespace(end_of_dataloader=True, remainder=remainder)


@pytest.mark.parametrize(
    ("rank", "remainder", "kept"),
    [(0, 3, 3), (1, 3, 0), (0, 5, 4), (1, 5, 1), (0, 0, None), (1, -1, None)],
)
def test_rows_that_fill_the_last_batch_of_several_processes_count_once(rank, remainder, kept):
    """Two processes with four rows each; `remainder` rows of the last eight are not repeated ones."""
    assert count(rank, remainder) == kept
    rows = 4 if kept is None else kept
    trainer = SimpleNamespace(
        args=SimpleNamespace(per_device_eval_batch_size=4),
        accelerator=SimpleNamespace(gradient_state=state(remainder), num_processes=2, process_index=rank),
    )
    [(batch, weight)] = _TokenMean._weigh(trainer, {"labels": torch.ones(4, 6, dtype=torch.long)})
    assert (batch["labels"] != -100).any(1).tolist() == [True] * rows + [False] * (4 - rows)
    assert weight == rows * 5
    flat = {"labels": torch.ones(1, 24, dtype=torch.long), "position_ids": torch.arange(24)[None] % 6}
    [(batch, _)] = _TokenMean._weigh(trainer, flat)
    assert (batch["labels"] != -100).sum().item() == rows * 6


PAIRS = [f"data.train={find_demo_data('pairs.jsonl')}", "data.eval=[]", "data.max_tokens=256", *EVALUATE]


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_the_loss_of_pairs_is_their_mean_for_every_batch(train, method):
    """ORPO's loss holds a mean over the tokens of a batch, so that 2, 2 and 1 rows gave another number than 5."""
    own = [f"method={method}", "data.held_out=5"]
    losses = [
        read_held_out(train(f"run{size}", *PAIRS, *own, f"trainer.per_device_eval_batch_size={size}"))
        for size in (2, 5)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_standard_error_is_that_of_a_ratio():
    """For groups of one size it is that of a mean: the standard deviation over the root of the number of groups."""
    losses = [1.0, 2.0, 4.0, 5.0]
    assert estimate_error([(loss * 3, 3) for loss in losses]) == pytest.approx(stdev(losses) / 2)
    # Groups of different sizes with one mean have no spread.
    assert estimate_error([(6.0, 3), (2.0, 1)]) == 0
    assert estimate_error([(6.0, 3)]) is None and estimate_error([]) is None


def test_a_reward_model_measures_what_evaluate_does(train, tmp_path):
    rows = find_demo_data("pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(rows[:5]), encoding="utf-8")
    held = [f"data.eval={tmp_path / 'pairs.jsonl'}", "trainer.per_device_eval_batch_size=2"]
    run = train("run", *PAIRS, "method=reward", *held)
    expected = evaluate_pairs(str(run), [tmp_path / "pairs.jsonl"], 256)
    assert read_held_out(run) == pytest.approx(expected.loss, abs=1e-5)


def weigh(method, rank, remainder, loss_type="sigmoid"):
    """Return the rows of each part of a process's last batch of four pairs, and its weight."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(per_device_eval_batch_size=4, loss_type=[loss_type]),
        accelerator=SimpleNamespace(gradient_state=state(remainder), num_processes=2, process_index=rank),
        method=METHODS[method],
    )
    inputs = {"input_ids": torch.arange(8)[:, None], "ref_chosen_logps": torch.arange(4), "prompt": list("abcd")}
    return [(batch["input_ids"].flatten().tolist(), weight) for batch, weight in _RowMean._weigh(trainer, inputs)]


def test_pairs_that_fill_the_last_batch_of_several_processes_count_once():
    """Two processes with four pairs each: `input_ids` holds the chosen answers, then the rejected ones."""
    singly = [[row, row + 4] for row in range(4)]
    assert weigh("dpo", 1, 6) == list(zip(singly, (1, 1, 0, 0), strict=True))
    assert weigh("dpo", 1, 3) == list(zip(singly, (0, 0, 0, 0), strict=True))
    assert weigh("dpo", 1, 0) == [([*range(8)], 4)]
    assert weigh("dpo", 1, 0, "sft") == list(zip(singly, (1, 1, 1, 1), strict=True))
    assert weigh("kto", 1, 6) == [([*range(8)], 2)]  # it compares the rows of a batch
