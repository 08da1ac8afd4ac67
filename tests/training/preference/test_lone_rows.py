"""KTO compares the answers of a batch: no row is compared with itself."""

import json
import logging

import pytest
from datasets import Dataset

from finetune.errors import TrainingError
from finetune.recipe.methods import METHODS
from finetune.training.preference.prepared_rows import leave_out_lone_row
from finetune.training.run import run_training


def list_batches(rows, batch):
    answers = [row["completion_ids"] for row in rows]
    return [answers[start : start + batch] for start in range(0, len(answers), batch)]


@pytest.mark.parametrize(("rows", "batch", "kept"), [(5, 2, 4), (5, 4, 4), (6, 4, 6), (4, 2, 4), (7, 3, 6), (3, 8, 3)])
def test_the_last_row_is_left_out_where_it_is_alone(caplog, rows, batch, kept):
    data = Dataset.from_dict({"completion_ids": [[number] for number in range(rows)]})
    with caplog.at_level(logging.INFO, logger="finetune"):
        found = leave_out_lone_row(data, METHODS["kto"], batch, "training")
    assert len(found) == kept
    assert min(map(len, list_batches(found, batch))) > 1
    assert (f"1 of {rows} rows for training is left out" in caplog.text) == (kept < rows)
    assert leave_out_lone_row(data, METHODS["dpo"], batch, "training") is data


def test_one_row_alone_is_refused():
    with pytest.raises(TrainingError, match="there is one row for evaluation"):
        leave_out_lone_row(Dataset.from_dict({"completion_ids": [[1]]}), METHODS["kto"], 2, "evaluation")


def test_a_run_says_so(make_pairs_recipe, tmp_path, caplog):
    """Of five rows and a batch of two, the last was its own mismatched pair, in training and in evaluation."""
    make_pairs_recipe("unused", "kto")
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}.", "label": n % 2 == 0} for n in range(5)]
    for name in ("pairs.jsonl", "held_pairs.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sizes = ["trainer.per_device_train_batch_size=2", "trainer.per_device_eval_batch_size=4", "trainer.max_steps=3"]
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert run_training(make_pairs_recipe("run", "kto", *sizes, "trainer.eval_strategy=epoch")).steps == 3
    for use, batch in (("training", 2), ("evaluation", 4)):
        assert f"1 of 5 rows for {use} is left out: kto compares the answers of a batch of {batch}" in caplog.text


def test_the_shared_input(make_pairs_recipe, shared, caplog):
    file = shared / "cases" / "pairs" / "kto5.jsonl"
    if not file.is_file():
        pytest.skip("the input is not there")
    settings = [f"data.train={file}", "data.eval=[]", "trainer.per_device_train_batch_size=2", "trainer.max_steps=6"]
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert run_training(make_pairs_recipe("run", "kto", *settings)).steps == 6
    assert "1 of 5 rows for training is left out" in caplog.text
