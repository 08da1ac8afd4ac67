"""What is read from the configuration of a Llama folder."""

import pytest
from transformers import LlamaConfig

from finetune.yulan.llama_files import read_rope


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
