"""Adapters of other tools on small bases of our own: what PEFT applies is what is exported, down to tied tables and odd tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from added_tokens import add_token, fill_table
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.errors import CheckpointError, ExportError, FinetuneError
from finetune.exporting.adapters.adapter_targets import list_lora_modules
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.opening import open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = ExportSettings("float32")
TEMPLATES = Path(__file__).parents[2] / "templates"
TOKENS = torch.arange(3, 40).unsqueeze(0)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def make_base(nano_llama, tmp_path):
    """Return a function that writes a tiny Llama with nano's tokenizer."""
    vocabulary = json.loads((nano_llama / "config.json").read_text())["vocab_size"]

    def make(name="base", dtype=torch.float32, **options):
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config = LlamaConfig(
            vocab_size=vocabulary, initializer_range=0.1, bos_token_id=1, eos_token_id=2, **sizes, **options
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / name)
        for file in nano_llama.glob("tokenizer*"):
            shutil.copy(file, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def adapt(tmp_path):
    """Return a function that writes an adapter of a base with every number random."""

    def run(base, name="adapter", rows=None, **options):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
        tuned = get_peft_model(model, LoraConfig(**options))
        torch.manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        tuned.save_pretrained(tmp_path / name)
        with torch.no_grad():
            return tmp_path / name, tuned.eval()(input_ids=TOKENS).logits

    return run


def read_logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("base", "options", "unties"),
    [
        ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}, True),
        ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, True),
        ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"tie_word_embeddings": True}, {"trainable_token_indices": {"lm_head": [5, 9]}}, True),
        ({"tie_word_embeddings": True}, {"trainable_token_indices": [5, 9]}, False),
        ({"tie_word_embeddings": True}, {}, False),
        (
            {"attention_bias": True},
            {"lora_bias": True, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
            True,
        ),
        ({"attention_bias": True}, {"bias": "all"}, True),
        ({"attention_bias": True, "mlp_bias": True}, {"bias": "lora_only", "target_modules": ["up_proj"]}, True),
        ({}, {"target_modules": ["v_proj"], "target_parameters": ["mlp.up_proj.weight"]}, True),
        ({}, {"target_modules": [], "target_parameters": ["o_proj.weight"]}, True),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
        ({}, {"rows": 1544}, True),
        ({"tie_word_embeddings": True}, {"rows": 1540, "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    ],
    ids=str,
)
def test_what_peft_applies_is_exported(make_base, adapt, tmp_path, base, options, unties):
    adapter, live = adapt(make_base(**base), **options)
    report = export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert (read_logits(tmp_path / "export") - live).abs().max() < 1e-4
    assert report.verify.max_abs <= 1e-4
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    names = load_file(tmp_path / "export" / "model.safetensors").keys()
    assert config["tie_word_embeddings"] is not unties
    assert ("lm_head.weight" in names) is unties


def test_a_head_that_stays_tied_follows_its_embedding_also_where_the_file_has_both(make_base, adapt, tmp_path):
    base = make_base(tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter, live = adapt(base, trainable_token_indices=[5, 9])
    export_result(open_result(adapter), tmp_path / "export", SETTINGS)
    assert (read_logits(tmp_path / "export") - live).abs().max() < 1e-4


def test_a_tied_base_without_prefix(make_base, adapt, tmp_path):
    base = make_base(tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    adapter, live = adapt(base)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert (read_logits(tmp_path / "export") - live).abs().max() < 1e-4


def test_the_copy_of_a_table_beside_its_adapter_counts(make_base, adapt, tmp_path):
    """PEFT loads it, so where it differs from the base, it is the base of the adapter."""
    adapter, _ = adapt(make_base(), target_modules=["q_proj", "lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.5
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    export_result(open_result(adapter), tmp_path / "export", SETTINGS)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    with torch.no_grad():
        assert (read_logits(tmp_path / "export") - live(input_ids=TOKENS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "self_attn.v_proj"]},
        {"target_modules": r".*layers\.[02]\..*(up|down)_proj"},
        {"target_modules": ALL, "exclude_modules": ["layers.1.self_attn.q_proj", "up_proj"]},
        {"target_modules": ALL, "exclude_modules": r".*mlp.*"},
        {"target_modules": ALL, "layers_to_transform": 1},
        {"target_modules": ALL, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ALL, "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["model.layers.0.mlp.up_proj", "proj"]},
    ],
    ids=str,
)
def test_the_chosen_layers_are_pefts(options):
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    names += [
        f"model.layers.{layer}.{part}.{name}.weight"
        for layer in range(3)
        for part, name in [("self_attn", name) for name in ALL[:4]] + [("mlp", name) for name in ALL[4:]]
    ]
    config = LoraConfig(**options)
    expected = {
        name
        for name in names
        if check_target_module_exists(config, name.removesuffix(".weight")) is True
        or getattr(check_target_module_exists(config, name.removesuffix(".weight")), "re", None)
    }
    assert list_lora_modules(options, names) == expected
    assert 0 < len(expected) < len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.embed_tokens.weight"),
            "1 tensor is missing of modules_to_save or bias",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp" in name],
            "3 of the 14 layers that adapter_config.json names",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.lm_head.lora_B.weight": torch.ones(1312, 4),
                }
            ),
            "holds LoRA for 1 layer that its target_modules leaves out, which PEFT would drop",
        ),
    ],
)
def test_tensors_are_counted(make_base, adapt, tmp_path, change, message):
    """What is missing is a fresh adapter to PEFT, with no effect: it was exported as "equal to what was trained"."""
    adapter, _ = adapt(make_base(), modules_to_save=["embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=message):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS)


def edit_tokenizer(base, **changes):
    path = base / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("changes", "template"),
    [
        ({"bos_token": None}, ""),
        ({"eos_token": None}, ""),
        ({"pad_token": "</s>"}, ""),
        ({}, CHATML),
        ({"bos_token": None}, CHATML),
        ({}, "{{ raise_exception('no') }}"),
    ],
    ids=str,
)
def test_tokenizers_of_other_tools(make_base, adapt, tmp_path, changes, template):
    base = make_base()
    edit_tokenizer(base, **changes)
    if template:
        (base / "chat_template.jinja").write_text(template)
    adapter, live = adapt(base)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert (read_logits(tmp_path / "export") - live).abs().max() < 1e-4
    source = template or (TEMPLATES / "yulan-mini.jinja").read_text()
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == source
    # transformers 4.46 reads the template there alone; every other character is the base's.
    kept = (base / "tokenizer_config.json").read_text().removesuffix("}")
    expected = f'{kept},\n  "chat_template": {json.dumps(source)}}}'
    assert (tmp_path / "export" / "tokenizer_config.json").read_text() == expected


def test_an_export_without_any_tokenizer_is_compared_too(make_base, adapt, tmp_path):
    base = make_base()
    for file in base.glob("tokenizer*"):
        file.unlink()
    adapter, _ = adapt(base)
    assert export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier()).verify.rows == 8


def test_a_base_that_has_moved(make_base, adapt, tmp_path):
    adapter, live = adapt(make_base())
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"its base model .*base' cannot be used(.|\n)*--base-model"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier(), base_model=str(moved))
    assert (read_logits(tmp_path / "export") - live).abs().max() < 1e-4


def test_a_quantized_base_is_refused_by_that_name(make_base, adapt, tmp_path):
    base = make_base()
    adapter, _ = adapt(base)
    full = tmp_path / "full"
    shutil.copytree(base, full)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(
        CheckpointError, match=r"its weights are quantized \(bitsandbytes\); give the full-precision checkpoint"
    ):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, base_model=str(full))


def test_a_wrong_base_model_of_a_run_is_refused(train, make_base, tmp_path):
    run = train("run", "trainer.max_steps=1")
    with pytest.raises(FinetuneError, match="was trained on other weights than"):
        export_result(open_result(run), tmp_path / "export", SETTINGS, base_model=str(make_base()))


def test_the_card_names_the_base_that_was_taken(make_base, adapt, tmp_path):
    base = make_base("my-llama")
    (base / "README.md").write_text("---\nlanguage: de\nlicense: llama3\n---\n# Mine\n")
    adapter, _ = adapt(base)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS)
    card = (tmp_path / "export" / "README.md").read_text()
    assert card.startswith("---\nlicense: llama3\npipeline_tag")
    assert "# my-llama, fine-tuned" in card
    assert "YuLan" not in card
    (base / "README.md").unlink()
    export_result(open_result(adapter), tmp_path / "second", SETTINGS)
    card = (tmp_path / "second" / "README.md").read_text()
    assert "license:" not in card
    assert "names no licence" in card


def test_sampling_settings_of_the_base_are_kept(make_base, adapt, tmp_path):
    base = make_base()
    (base / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]})
    )
    adapter, _ = adapt(base)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.6, 0.9)
    assert {2, 7} <= set(written["eos_token_id"])


def test_a_tokenizer_larger_than_the_table(make_base, adapt, tmp_path):
    base = make_base()
    adapter, _ = adapt(base)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, adapter)
    fill_table(adapter, 1312)
    add_token(adapter, "<|mine|>")
    with pytest.raises(
        ExportError, match=r"its tokenizer has 1 token beyond the 1,312 rows .*first: '<\|mine\|>', 1312"
    ):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS)


def test_a_base_that_pads_with_a_token_beyond_its_table(make_base, adapt, tmp_path):
    """The export named that token in `config.json`, and transformers could not open it."""
    base = make_base(pad_token_id=0)
    fill_table(base, 1312)
    add_token(base, "<|mine|>")
    edit_tokenizer(base, pad_token="<|mine|>")
    adapter, live = adapt(base)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert (read_logits(tmp_path / "export") - live).abs().max() < 1e-4
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "export" / name).read_text())["pad_token_id"] == 0


def test_an_export_of_another_base_can_be_talked_to(make_base, adapt, tmp_path):
    adapter, _ = adapt(make_base())
    export_result(open_result(adapter), tmp_path / "export", SETTINGS)
    assert open_model(str(tmp_path / "export")).answer("a", 2).tokens > 0
    assert open_model(str(adapter)).answer("a", 2).tokens > 0
