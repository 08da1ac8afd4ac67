"""The held-out loss of a run is the mean over trained tokens: what `finetune evaluate` gives, for every evaluation batch."""

import json
from types import SimpleNamespace

import pytest
import torch

from finetune.evaluation.token_loss import evaluate_path
from finetune.training.held_out_loss import _leave_out_repeated

EVALUATE = ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.max_steps=2"]


def read_held_out(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.per_device_eval_batch_size=1"],
        ["trainer.per_device_eval_batch_size=3"],
        ["trainer.per_device_eval_batch_size=8", "trainer.dataloader_num_workers=0"],
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
    ids=["1", "3", "8", "workers", "drop_last", "padding_free"],
)
def test_a_run_measures_what_evaluate_does(train, tmp_path, settings):
    """Before, this recipe gave 8.345, 8.407 and 8.385 for evaluation batches of 4, 2 and 1 rows."""
    run = train("run", *EVALUATE, *settings)
    expected = evaluate_path(str(run), [tmp_path / "held.jsonl"], 128)
    assert read_held_out(run) == pytest.approx(expected.loss, abs=1e-5)


def make_accelerator(rank, remainder, processes=2):
    state = SimpleNamespace(end_of_dataloader=True, remainder=remainder)
    return SimpleNamespace(gradient_state=state, num_processes=processes, process_index=rank)


@pytest.mark.parametrize(
    ("rank", "remainder", "kept"),
    [(0, 3, 3), (1, 3, 0), (0, 5, 4), (1, 5, 1), (0, 0, 4), (1, -1, 4)],
)
def test_rows_that_fill_the_last_batch_of_several_processes_count_once(rank, remainder, kept):
    """Two processes with four rows each; `remainder` rows of the last eight are not repeated ones."""
    inputs = {"labels": torch.ones(4, 6, dtype=torch.long)}
    left = _leave_out_repeated(inputs, make_accelerator(rank, remainder), 4)["labels"]
    assert (left != -100).any(1).tolist() == [True] * kept + [False] * (4 - kept)
    flat = {"labels": torch.ones(1, 24, dtype=torch.long), "position_ids": torch.arange(24)[None] % 6}
    left = _leave_out_repeated(flat, make_accelerator(rank, remainder), 4)["labels"]
    assert (left != -100).sum().item() == kept * 6
    assert (inputs["labels"] == 1).all()
