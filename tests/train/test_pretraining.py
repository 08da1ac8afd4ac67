"""Pre-training on nano: packed rows, muP groups, the schedule, and a result that can be published and continued."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.check import load_recipe
from finetune.resources import find_demo_data
from finetune.train.run import run_training
from finetune.yulan.optimizer_states import open_states, read_state

RECIPE = """
method: pretrain
model: {checkpoint: nano, architecture: native}
data: {train: text.jsonl, eval: held.jsonl, max_tokens: 32}
adapter: {kind: none}
schedule: {length: 4, warmup: 1}
trainer:
  per_device_train_batch_size: 2
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""


@pytest.fixture
def make_recipe(tmp_path, nano):
    """Return a function that checks the small recipe with overrides; its run lies in `tmp_path/<name>`."""
    rows = [json.loads(line) for line in find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    texts = [json.dumps({"text": row["messages"][-1]["content"]}) for row in rows]
    (tmp_path / "text.jsonl").write_text("\n".join(texts[:32]), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text("\n".join(texts[32:]), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make(name, *overrides):
        return load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / name}", *overrides])

    return make


@pytest.fixture
def train(make_recipe):
    """Return a function that trains the small recipe and gives its run directory."""

    def run(name, *overrides, resume=False):
        return Path(run_training(make_recipe(name, *overrides), resume).run)

    return run


def read_metrics(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_run_can_be_published_and_continued_as_if_it_had_not_ended(train, tmp_path):
    data = ["trainer.train_sampling_strategy=sequential", "schedule.warmup=0"]
    whole = train("whole", *data)
    first = train("first", *data, "schedule.length=2", "optimizer.save_states=true")
    lines = (tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()
    losses = read_metrics(whole, "loss")
    assert read_metrics(first, "loss") == losses[:2]
    states = open_states(first / "model")
    assert states.step == 2
    assert [(group.lr, group.weight_decay) for group in states.groups] == [(1e-2, 0.1), (1e-2, 0.1), (1e-2, 0.0)]
    weights = load_file(first / "model" / "model.safetensors")
    for name, shape in states.shapes.items():
        assert torch.equal(read_state(states, name, torch.Size(shape)).weight, weights[name].reshape(shape))
    assert lines
