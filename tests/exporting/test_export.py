"""Merging every kind of LoRA adapter, and noticing when an export is not what was trained."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.errors import ExportError, OutputError, TemplateError
from finetune.exporting import merge, merged
from finetune.exporting.adapters.adapter_reading import read_adapter
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.opening import open_trained
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import Lineage, open_result, write_lineage
from finetune.yulan import shards
from finetune.yulan.native.modeling import load_native
from finetune.yulan.tensors import open_tensors

SETTINGS = ExportSettings("auto", "2GB")
TOKENS = torch.tensor([[1, 104, 300, 105, 400, 500, 106, 700]])
KINDS = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [104, 106], "lm_head": [106]},
    },
    "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "few-layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
}


def read_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_live_equals_reloaded_and_differs_from_the_base(make_adapter, nano_llama, tmp_path, kind):
    adapter = make_adapter(tmp_path / "adapter", **KINDS[kind])
    report = export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(nano_llama), adapter)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    expected = read_logits(live)
    assert torch.allclose(read_logits(reloaded), expected, atol=1e-4)
    assert (read_logits(LlamaForCausalLM.from_pretrained(nano_llama)) - expected).abs().max() > 0.01
    merged = live.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "export" / "model.safetensors").items():
        assert torch.allclose(tensor, merged[name], atol=1e-5), name
    assert report.verify.max_abs <= 1e-4
    assert report.verify.top1_agreement == 1.0
    assert report.verify.rows == 16  # bundled rows: this adapter came without any of its own


def test_an_adapter_of_the_native_model_is_folded_with_it(nano, tmp_path):
    """Its base is a native folder, so PEFT trained it there; merged into the fold it would be another model."""
    model = load_native(nano)
    model.name_or_path = str(nano)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "adapter")
    result = open_result(tmp_path / "adapter")
    report = export_result(result, tmp_path / "export", SETTINGS, LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    expected = read_logits(tuned)
    assert torch.allclose(read_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), expected, atol=1e-4)
    assert torch.allclose(read_logits(open_trained(result).model), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_small_pieces_give_the_same_weights(make_adapter, tmp_path, monkeypatch, kind):
    adapter = make_adapter(tmp_path / "adapter", **KINDS[kind])
    export_result(open_result(adapter), tmp_path / "large", SETTINGS)
    monkeypatch.setattr(shards, "_PIECE_ELEMENTS", 256 * 7)  # seven rows, which divides none of the tensors
    export_result(open_result(adapter), tmp_path / "small", SETTINGS)
    large, small = (load_file(tmp_path / name / "model.safetensors") for name in ("large", "small"))
    for name, tensor in large.items():
        # Some processors' matrix products round seven rows otherwise than many: a few units in float32's last place.
        assert torch.allclose(small[name], tensor, rtol=1e-6, atol=1e-6 * tensor.std().item())


@pytest.mark.parametrize("alpha", [12, 16])  # a scale of 3, and one of 4, whose product is taken another way
def test_the_merge_equals_pefts_to_the_last_bit(make_adapter, nano_llama, tmp_path, alpha):
    adapter = make_adapter(tmp_path / "adapter", lora_alpha=alpha)
    export_result(open_result(adapter), tmp_path / "export", ExportSettings("bfloat16", "2GB"))
    ours = load_file(tmp_path / "export" / "model.safetensors")
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(nano_llama), adapter)
    merged = live.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, merged[name].bfloat16()) for name, tensor in ours.items())


def test_sixteen_bits_are_rounded_once(make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    for dtype in ("float32", "bfloat16"):
        export_result(open_result(adapter), tmp_path / dtype, ExportSettings(dtype, "2GB"), LogitVerifier())
    exact, rounded = (load_file(tmp_path / d / "model.safetensors") for d in ("float32", "bfloat16"))
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_holds_all_that_servers_need(make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    export_result(open_result(adapter), tmp_path / "export", ExportSettings("auto", "2MB"), LogitVerifier())
    names = {path.name for path in (tmp_path / "export").iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 3
    assert names - shards == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = (tmp_path / "export" / "README.md").read_text()
    verify = json.loads((tmp_path / "export" / "export.json").read_text())["verify"]
    assert f"{verify['max_abs']:.2e}" in card
    assert not list(tmp_path.glob(".export*"))


def forget_scale(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] = config["lora_alpha"] * 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_a_lost_adapter_is_noticed(make_adapter, tmp_path, monkeypatch):
    """The merged model answers as the base: reported against every peer (unsloth 1593, mlx-lm 1172, peft 2105)."""
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    monkeypatch.setattr(
        "finetune.exporting.adapters.adapter_changes.Adapter.merge_rows", lambda self, name, start, base: base
    )
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ExportError, match="the reopened model is not what was trained"):
            export_result(open_result(adapter), tmp_path / "export", ExportSettings(dtype, "2GB"), LogitVerifier())
        assert not (tmp_path / "export").exists()
        assert not list(tmp_path.glob(".export*"))


def test_a_wrong_scale_is_noticed(make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    right = merged.read_adapter

    def read_wrongly(folder, base, shapes):
        found = right(folder, base, shapes)
        for change in found.changes.values():
            change.scale *= 1.05
        return found

    monkeypatch.setattr(merged, "read_adapter", read_wrongly)
    with pytest.raises(ExportError, match="logits differ by up to"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert not (tmp_path / "export").exists()


def test_a_flipped_bit_on_disk_is_noticed(make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    right = merge.write_shards

    def write_badly(folder, *arguments):
        size = right(folder, *arguments)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return size

    monkeypatch.setattr(merge, "write_shards", write_badly)
    with pytest.raises(ExportError, match=r"1 tensor differs after reopening \(first: lm_head.weight"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert not (tmp_path / "export").exists()


def edit_config(**changes):
    def edit(adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensors(edit_all):
    def edit(adapter):
        tensors = load_file(adapter / "adapter_model.safetensors")
        edit_all(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return edit


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA adapters can be used"),
        (
            edit_config(init_lora_weights="pissa"),
            "init_lora_weights is 'pissa', which changes the base before training",
        ),
        (edit_config(init_lora_weights="pissa_niter_4"), "changes the base before training"),
        (edit_config(layer_replication=[[0, 2], [1, 3]]), "uses layer_replication, which this kit cannot merge"),
        (edit_config(bias="some", use_qalora=True), "uses bias, use_qalora, which"),
        (edit_config(bias="all"), "16 tensors are missing of modules_to_save or bias"),
        (edit_config(a_switch_of_tomorrow=True), "uses a_switch_of_tomorrow, which"),
        (edit_config(r=8), "q_proj: its A has rank 4, adapter_config.json says 8"),
        (edit_config(use_dora=True), "use_dora is set, but its lora_magnitude_vector is missing"),
        (
            edit_config(lora_bias=True),
            "lora_bias is set, but 28 biases are missing (first: model.layers.0.mlp.down_proj",
        ),
        (
            edit_tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 320, dtype=torch.int8)})),
            "has the type torch.int8; expected a floating-point type",
        ),
        (edit_tensors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")), "q_proj: has LoRA's A without its B"),
        (edit_tensors(lambda t: t.update({f"{PREFIX}.lora_B.weight": torch.zeros(3, 4)})), "q_proj: b is [3, 4]"),
        (edit_tensors(lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(float("nan"))), "holds NaN or infinite values"),
        (edit_tensors(lambda t: t.update({"base_model.model.x.weight": torch.zeros(1)})), "belongs to x.weight, which"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "found: adapter_model.bin"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(make_adapter, tmp_path, damage, message):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    damage(adapter)
    with pytest.raises(ExportError) as caught:
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert message in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_all_faults_of_an_adapter_come_at_once(make_adapter, nano_llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])

    def damage(tensors):
        tensors.pop(f"{PREFIX}.lora_B.weight")
        tensors["base_model.model.x.weight"] = torch.zeros(1)

    edit_tensors(damage)(adapter)
    with pytest.raises(ExportError) as caught:
        read_adapter(adapter, open_tensors(nano_llama))
    assert "belongs to x.weight" in str(caught.value)
    assert "has LoRA's A without its B" in str(caught.value)


def make_origin(base, **changes):
    template = (changes.pop("template_fingerprint", None)) or "0" * 16
    values = {"checkpoint": str(base), "base": str(base), "base_fingerprint": fingerprint_checkpoint(base)}
    values |= {"quantize": "none", "dtype": "float32", "template": "yulan-mini", "method": "sft"}
    return Lineage(**{**values, "template_fingerprint": template, **changes})


def test_an_adapter_of_another_base_is_refused(make_adapter, nano_llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    write_lineage(adapter, make_origin(nano_llama, base_fingerprint="f" * 64), [])
    with pytest.raises(ExportError, match=r"was trained on other weights than .* holds now"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())


def test_another_template_is_refused(make_adapter, nano_llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    write_lineage(adapter, make_origin(nano_llama), [])
    with pytest.raises((ExportError, TemplateError), match="its chat template is not the one that it was trained with"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    assert not (tmp_path / "export").exists()


def test_an_adapter_without_effect_is_said_not_refused(nano_llama, tmp_path):
    model = LlamaForCausalLM.from_pretrained(nano_llama)
    model.name_or_path = str(nano_llama)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    export_result(open_result(tmp_path / "adapter"), tmp_path / "export", SETTINGS, LogitVerifier())
    assert "The adapter is empty" in (tmp_path / "export" / "README.md").read_text()


def test_a_taken_output_is_left_alone(make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **KINDS["lora"])
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    shutil.rmtree(tmp_path / "export")
    (tmp_path / "export").write_text("a file")
    with pytest.raises(OutputError, match="exists and is not a folder"):
        export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
