"""Runs of several processes: resumed as they began, with the same recipe everywhere, on the GPUs that the launcher gave."""

import json

import pytest
import torch
from transformers import TrainingArguments

from finetune.errors import MachineError, TrainingError
from finetune.models.engine import check_launch_precision, describe_idle_gpus
from finetune.training.journal import processes
from finetune.training.journal.processes import check_same_processes, check_same_recipes
from finetune.training.run import run_training


@pytest.fixture
def two_gpus(monkeypatch):
    """Two visible GPUs without a launcher, for which transformers sets `n_gpu` to 2; simulated by that number."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: vars(self).get("_n_gpu") or 2))


@pytest.mark.parametrize("method", [[], ["method=orpo", "data.held_out=4", "data.eval=[]"]], ids=["sft", "orpo"])
def test_two_visible_gpus_train_as_one_does(make_recipe, read_losses, tmp_path, request, method):
    """ORPO, CPO, SimPO and pre-training were wrapped in DataParallel, with twice the batch."""
    from finetune.files.resources import find_demo_data

    settings = [*method, *([f"data.train={find_demo_data('pairs.jsonl')}"] if method else []), "trainer.max_steps=2"]
    run_training(make_recipe("one", *settings))
    request.getfixturevalue("two_gpus")
    run_training(make_recipe("two", *settings))
    assert read_losses(tmp_path / "two") == read_losses(tmp_path / "one")


def test_idle_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = describe_idle_gpus(torch.device("cuda", 0))
    assert told.startswith("2 GPUs are visible, and this run uses one of them, cuda:0;")
    assert "accelerate launch --config_file recipes/accelerate/ddp.yaml" in told
    assert describe_idle_gpus(torch.device("cpu")) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert describe_idle_gpus(torch.device("cuda", 0)) is None


def test_a_run_says_what_shared_it_and_is_resumed_by_that_only(make_recipe, tmp_path, monkeypatch):
    """ZeRO-2 and then one process, or DDP and then one: rate, optimizer, effective batch size and place in the data changed."""
    steps = ["trainer.save_strategy=steps", "trainer.save_steps=2"]
    run_training(make_recipe("run", *steps))
    record = tmp_path / "run" / "run.json"
    content = json.loads(record.read_text())
    assert (content["engine"], content["processes"]) == ("one", 1)
    check_same_processes(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="was begun by one process and cannot be resumed by 2 processes with DDP"):
        check_same_processes(tmp_path / "run")
    monkeypatch.undo()
    content |= {"engine": "zero2", "processes": 4, "status": "running"}
    record.write_text(json.dumps(content))
    with pytest.raises(
        TrainingError, match="was begun by 4 processes with ZeRO-2 and cannot be resumed by one process"
    ):
        run_training(make_recipe("run", *steps), resume=True)


def test_processes_with_different_recipes_do_not_begin(make_recipe, monkeypatch):
    """They trained to the end, each by its own recipe."""
    first, second = make_recipe("run").recipe, make_recipe("run", "trainer.learning_rate=1e-4").recipe
    sent = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "gather_object", lambda own: sent.extend(own) or list(sent))
    check_same_recipes(first, resume=False)
    check_same_recipes(first, resume=False)
    with pytest.raises(
        TrainingError, match=r"process 0 has `learning_rate: 0.002`, process 2 has `learning_rate: 0.0001`"
    ):
        check_same_recipes(second, resume=False)
    sent[1:] = []
    with pytest.raises(TrainingError, match="process 0 has `resume: False`, process 1 has `resume: True`"):
        check_same_recipes(first, resume=True)


def test_the_recipe_decides_the_dtype_and_not_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch_precision("bf16")
    with pytest.raises(MachineError, match=r"is bf16, but this recipe.s model.dtype computes in float32"):
        check_launch_precision("no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch_precision("bf16")
