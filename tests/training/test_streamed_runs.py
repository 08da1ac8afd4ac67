"""Runs whose base is streamed from main memory: the losses and the adapter of runs whose base is on the device."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.files.resources import list_recipes
from finetune.models.engine import check_engine
from finetune.training.run import run_training

NF4, STREAMED = "model.quantize=nf4", "model.stream_layers=true"
STEPS = ["trainer.gradient_checkpointing=true", "trainer.save_strategy=steps", "trainer.save_steps=2"]
EVALUATED = ["trainer.eval_strategy=steps", "trainer.eval_steps=2"]


def read_run(run):
    """Return what a run measured at every step, without times, and its adapter."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in line.items() if "loss" in key or key == "grad_norm"} for line in lines]
    return kept, load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_run(found, expected):
    (lines, weights), (expected_lines, expected_weights) = read_run(found), read_run(expected)
    assert lines == expected_lines
    assert any("eval_loss" in line for line in lines)
    assert not [name for name in expected_weights if not torch.equal(weights[name], expected_weights[name])]


def test_a_streamed_run_and_its_resumption_are_the_same_run(train, deep_base):
    options = [f"model.checkpoint={deep_base}", NF4, *STEPS, *EVALUATED, "answers=4"]
    whole, streamed = train("whole", *options), train("streamed", *options, STREAMED)
    assert_same_run(streamed, whole)
    assert (streamed / "answers.md").read_text() == (whole / "answers.md").read_text()
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(streamed / name)
    train("streamed", *options, STREAMED, resume=True)
    assert_same_run(streamed, whole)


def test_streamed_preference_training_is_the_same_run(make_pairs_recipe, deep_base):
    """Log-probabilities of the reference model that are computed once have a key, which the base's weights decide."""
    options = [*EVALUATED, "trainer.learning_rate=1e-3", "trainer.precompute_ref_log_probs=true", NF4]
    options.append(f"model.checkpoint={deep_base}")
    runs = [
        Path(run_training(make_pairs_recipe(name, "dpo", *options, *streams)).run)
        for name, streams in (("whole", []), ("streamed", [STREAMED]))
    ]
    assert_same_run(runs[1], runs[0])


def test_a_base_that_is_trained_is_not_streamed():
    reason = "model.stream_layers: moves frozen weights only, and adapter.kind: none trains them all"
    with pytest.raises(RecipeError, match=reason.replace(".", r"\.")):
        load_recipe(list_recipes()["sft_lora"], [STREAMED, "adapter={kind: none}"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_several_processes_do_not_stream(engine):
    recipe = load_recipe(list_recipes()["sft_lora"], [STREAMED, "adapter.train_tokens=[]"])
    with pytest.raises(RecipeError, match=r"model\.stream_layers: layers are streamed in one process only"):
        check_engine(recipe, engine)
