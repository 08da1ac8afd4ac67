"""Layers that are streamed from main memory: the same bits as on the card, and the memory of two layers."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_streamed_layers_train_the_same_run(train, kind):
    settings = [f"model.quantize={kind}", "trainer.gradient_checkpointing=true"]
    whole, streamed = train("whole", *settings), train("streamed", *settings, "model.stream_layers=true")
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, streamed))
    assert all(torch.equal(first[name], second[name]) for name in first)
