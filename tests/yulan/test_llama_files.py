"""What is read from a Llama folder, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from finetune.errors import CheckpointError
from finetune.yulan.llama_files import check_llama, read_rope


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 5.0},
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5.0, "rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_rope_is_read_as_transformers_reads_it(keys):
    found = LlamaConfig.from_dict({"model_type": "llama", **keys}).rope_parameters
    assert {key: value for key, value in read_rope(keys).items() if key != "type"} == {
        key: value for key, value in found.items() if key != "type"
    }


def test_weights_of_whole_numbers_are_refused(nano_llama, tmp_path):
    """Without their scale they mean nothing; a GGUF file was written from them and called equal."""
    shutil.copytree(nano_llama, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"1 of a wrong type \({name} is torch.int8, expected a floating-point type\)"
    ):
        check_llama(tmp_path / "base")
