"""How often a run logs: its curve has points, however short the run is."""

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.check.recipes import load_recipe
from finetune.training.journal.progress import ShortRunLogging
from finetune.training.run import run_training


@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (39, 1), (40, 2), (199, 9), (200, 10), (5000, 10)])
def test_a_short_run_has_twenty_points_or_one_for_each_step(tmp_path, steps, interval):
    state = TrainerState(max_steps=steps, logging_steps=10)
    ShortRunLogging().on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl())
    assert state.logging_steps == interval


def test_a_run_of_three_steps_has_a_curve(make_recipe, tmp_path):
    """TRL's default is every ten steps, so that the file, the plot and the page were empty."""
    make_recipe("unused")
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("  logging_steps: 1\n", ""), encoding="utf-8")
    run = Path(run_training(load_recipe(file, [f"output={tmp_path / 'run'}", "trainer.max_steps=3"])).run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
