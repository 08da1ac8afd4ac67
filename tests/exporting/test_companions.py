"""Configuration, template and stop tokens of an export: whole for programs that read only a part of them."""

import json

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from finetune.errors import ExportError
from finetune.exporting import companions
from finetune.exporting.companion_checks import check_generation
from finetune.exporting.merge import export_result
from finetune.exporting.merged import open_subject
from finetune.exporting.verify import LogitVerifier
from finetune.files.resources import list_templates
from finetune.models.opening import open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result

SETTINGS = ExportSettings("auto", "2GB")
THETA = 490_000.0
FULL = ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.gradient_checkpointing=true"]
OWN_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def save_with_theta(nano_llama, folder):
    """Save a base as transformers 5 does: RoPE's base only in `rope_parameters`."""
    model = LlamaForCausalLM.from_pretrained(nano_llama)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano_llama).save_pretrained(folder)
    assert "rope_theta" not in read(folder / "config.json")
    return folder


@pytest.mark.parametrize("overrides", [[], FULL], ids=["adapter", "all-weights"])
def test_ropes_base_stands_in_both_forms(train, nano_llama, tmp_path, overrides):
    """transformers 4 and mlx-lm read 10,000 where it stands only in `rope_parameters`."""
    base = save_with_theta(nano_llama, tmp_path / "base")
    run = train("run", f"model.checkpoint={base}", "trainer.max_steps=1", *overrides)
    export_result(open_result(run), tmp_path / "export", SETTINGS, LogitVerifier())
    config = read(tmp_path / "export" / "config.json")
    assert config["rope_theta"] == THETA
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    assert AutoConfig.from_pretrained(tmp_path / "export").rope_parameters["rope_theta"] == THETA
    assert config.get("use_cache", True) is True


def test_a_fold_has_both_forms(nano_llama):
    config = read(nano_llama / "config.json")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": config["rope_theta"]}


def test_scaled_positions_stand_in_both_forms():
    scaled = {"type": "linear", "factor": 2.0}
    found = companions._describe_rope({"rope_theta": THETA, "rope_scaling": scaled}, None)
    rope = {"type": "linear", "factor": 2.0, "rope_type": "linear", "rope_theta": THETA}
    assert found == {"rope_theta": THETA, "rope_parameters": rope, "rope_scaling": rope}


@pytest.fixture
def templated_base(legacy_base):
    """A base with templates of its own, in three places."""
    path = legacy_base / "tokenizer_config.json"
    path.write_text(json.dumps({**read(path), "chat_template": "an older one"}, indent=2), encoding="utf-8")
    (legacy_base / "chat_template.jinja").write_text(OWN_TEMPLATE)
    (legacy_base / "additional_chat_templates").mkdir()
    (legacy_base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    return legacy_base


def find_templates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert read(folder / "tokenizer_config.json")["chat_template"] == tokenizer.chat_template
    assert not (folder / "additional_chat_templates").exists()
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template
    return tokenizer.chat_template


def check_stops(folder, expected):
    assert read(folder / "config.json")["eos_token_id"] == expected
    assert read(folder / "generation_config.json")["eos_token_id"] == expected
    assert AutoTokenizer.from_pretrained(folder).eos_token_id in expected


def test_the_trained_template_is_the_only_one(train, templated_base, tmp_path):
    base = [f"model.checkpoint={templated_base}", "trainer.max_steps=1", "data.max_tokens=2048"]
    run = train("run", *base, "data.template=yulan-mini")
    export_result(open_result(run), tmp_path / "export", SETTINGS, LogitVerifier())
    trained = list_templates()["yulan-mini"].read_text(encoding="utf-8")
    assert find_templates(tmp_path / "export") == find_templates(run / "adapter") == trained
    check_stops(tmp_path / "export", [2, 106])
    kept = read(templated_base / "tokenizer_config.json") | {"chat_template": trained}
    assert read(tmp_path / "export" / "tokenizer_config.json") == kept
    # It is a base as any other: with both stop tokens, and its template.
    again = train("again", f"model.checkpoint={tmp_path / 'export'}", *base[1:])
    assert open_model(str(again)).stop_tokens == (2, 106)


def test_an_adapter_of_peft_takes_over_the_template_of_its_base(templated_base, tmp_path):
    model = LlamaForCausalLM.from_pretrained(templated_base)
    model.name_or_path = str(templated_base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    export_result(open_result(tmp_path / "adapter"), tmp_path / "export", SETTINGS, LogitVerifier())
    assert find_templates(tmp_path / "export") == OWN_TEMPLATE
    check_stops(tmp_path / "export", [2, 106])


def test_the_card_says_only_what_was_tried(make_adapter, tmp_path):
    """It used to give commands of three programs, none of which was tried."""
    export_result(open_result(make_adapter(tmp_path / "adapter")), tmp_path / "export", SETTINGS, LogitVerifier())
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert f"reopened by transformers {transformers.__version__}" in card
    assert "No program that serves models was tried with this folder." in card
    assert "For llama.cpp and Ollama write a GGUF file with" in card
    commands = ("vllm serve", "sglang", "convert_hf_to_gguf", "ollama create", "llama-server")
    assert not any(command in card.lower() for command in commands)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"eos_token_id": 2}, r"config.json stops at 2, generation_config.json at \[2, 106\]"),
        ("tokenizer_config.json", {"chat_template": "x"}, "another chat template stands beside"),
        ("generation_config.json", {"eos_token_id": [2]}, r"lacks \[106\], which end a trained answer"),
        ("generation_config.json", {"pad_token_id": 106}, "pads with the stop token 106"),
    ],
)
def test_a_folder_that_says_two_things_is_refused(make_adapter, tmp_path, file, changes, message):
    result = open_result(make_adapter(tmp_path / "adapter"))
    export_result(result, tmp_path / "export", SETTINGS)
    subject = open_subject(result)
    check_generation(tmp_path / "export", subject)
    path = tmp_path / "export" / file
    path.write_text(json.dumps({**read(path), **changes}), encoding="utf-8")
    with pytest.raises(ExportError, match=message):
        check_generation(tmp_path / "export", subject)
