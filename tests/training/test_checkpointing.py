"""Gradient checkpointing of some layers: the same bits, and only these layers are computed again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from finetune.training.run import run_training

STEPS = 4


@pytest.fixture
def count_layers(monkeypatch):
    """Return a function that gives how many layers have been computed since it was last called."""
    forward, calls = LlamaMLP.forward, []

    def count(self, *arguments, **options):
        calls.append(self)
        return forward(self, *arguments, **options)

    def read():
        found = len(calls)
        calls.clear()
        return found

    monkeypatch.setattr(LlamaMLP, "forward", count)
    return read


@pytest.mark.parametrize("method", ["sft", "orpo"])
def test_every_third_layer_is_computed_again(make_recipe, make_pairs_recipe, deep_base, count_layers, method):
    def run(name, *overrides):
        given = [f"model.checkpoint={deep_base}", f"trainer.max_steps={STEPS}", *overrides]
        make = make_recipe if method == "sft" else lambda name, *more: make_pairs_recipe(name, method, *more)
        count_layers()
        folder = Path(run_training(make(name, *given, "row_losses=0", "trainer.per_device_train_batch_size=2")).run)
        return load_file(folder / "adapter" / "adapter_model.safetensors"), count_layers()

    kept, layers = run("kept", "trainer.gradient_checkpointing=false")
    third, more = run(
        "third", "trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing_kwargs={every_n_layers: 3}"
    )
    assert not [name for name in kept if not torch.equal(kept[name], third[name])]
    assert more - layers == 2 * STEPS  # layers 0 and 3 of 5
