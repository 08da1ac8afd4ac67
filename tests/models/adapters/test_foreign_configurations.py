"""Values of an adapter's configuration that PEFT takes for something else, or falls over, are refused by their key."""

import json

import pytest

from finetune.errors import ExportError
from finetune.models.adapter_config import read_adapter_config

_PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 4.0, "r is 4.0; expected a whole number above 0"),
        ("r", True, "r is True; expected a whole number above 0"),
        # "yes" was used as true by PEFT and merged as false: logits differed by 4e-4, and the message named the logits only.
        ("use_rslora", "yes", "use_rslora is 'yes'; expected true or false"),
        ("use_dora", 1, "use_dora is 1; expected true or false"),
        ("layers_to_transform", "0", "layers_to_transform is '0'; expected a layer's number, or a list of them"),
        ("layers_to_transform", [0, True], "layers_to_transform is [0, True]; expected a layer's number"),
        ("modules_to_save", "lm_head", "modules_to_save is 'lm_head'; expected a list of names"),
    ],
)
def test_values_of_another_type_are_refused_by_their_key(tmp_path, key, value, message):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**_PLAIN, key: value}))
    with pytest.raises(ExportError) as caught:
        read_adapter_config(tmp_path)
    assert f"{path}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"use_rslora": None, "layers_to_transform": None},
        {"use_dora": False, "layers_to_transform": [0, 3]},
        {"layers_to_transform": 2},
    ],
)
def test_what_peft_writes_is_taken(tmp_path, others):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**_PLAIN, **others}))
    assert read_adapter_config(tmp_path)["r"] == 4
