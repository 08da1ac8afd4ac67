"""Faults that are planted in an export: the comparison by layers gives the figures and the verdicts of whole models in memory."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune.errors import ExportError
from finetune.exporting.comparing.outputs import (
    cut_rows,
    measure_agreement,
    measure_difference,
    measure_kl,
    run_rows,
)
from finetune.exporting.comparing.rounding import check_comparison
from finetune.exporting.merge import export_result
from finetune.exporting.merged import open_merged, open_subject
from finetune.exporting.verify import compare_logits, list_rows
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result

LAYER = "model.layers.1"
TOKENS = [104, 106]


@pytest.fixture(scope="module")
def subject(tmp_path_factory, make_adapter):
    """An adapter with LoRA, token rows and DoRA's scales, on nano."""
    folder = tmp_path_factory.mktemp("planted") / "adapter"
    options = {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}, "use_dora": True}
    return open_subject(open_result(make_adapter(folder, **options)))


@pytest.fixture(scope="module")
def exports(subject, tmp_path_factory):
    """Whole exports by their types, each with the tensors that it was made of."""
    made = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path_factory.mktemp(dtype) / "export"
        export_result(subject.result, folder, ExportSettings(dtype))
        made[dtype] = folder, open_merged(subject, dtype, dequantized=False)
    return made


@pytest.fixture(scope="module")
def trained(subject):
    """Logits of the model that was trained, whole in memory, row by row."""
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(subject.base), subject.adapter)
    return run_rows(live.eval(), cut_rows(list_rows(subject)), batches=False).logits


def edit_weights(change):
    """Return a function that damages the tensors of an export, given them and those of its base."""

    def edit(folder, base):
        tensors = load_file(folder / "model.safetensors")
        change(tensors, load_file(base / "model.safetensors"))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**changes):
    """Return a function that changes settings of an export."""

    def edit(folder, base):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def lose_adapter(tensors, base):
    tensors.update({name: base[name].to(tensor.dtype) for name, tensor in tensors.items()})


def scale_adapter(tensors, base):
    for name, tensor in tensors.items():
        own = base[name].float()
        tensors[name] = (own + 1.05 * (tensor.float() - own)).to(tensor.dtype)


def swap_layers(tensors, base):
    for name in [name for name in tensors if name.startswith(LAYER)]:
        other = name.replace(LAYER, "model.layers.2")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def transpose(tensors, base):
    tensors[f"{LAYER}.self_attn.q_proj.weight"] = tensors[f"{LAYER}.self_attn.q_proj.weight"].T


def flip_bit(tensors, base):
    """Flip the lowest bit of the exponent of the largest number of a matrix, which is then twice or half as large."""
    flat = tensors[f"{LAYER}.mlp.down_proj.weight"].view(-1)
    bits, place = (torch.int32, 23) if flat.dtype == torch.float32 else (torch.int16, 7)
    flat.view(bits)[flat.abs().argmax()] ^= 1 << place


def lose_bias(tensors, base):
    tensors[f"{LAYER}.self_attn.k_proj.bias"].zero_()
    tensors[f"{LAYER}.self_attn.v_proj.bias"].zero_()


def lose_token_rows(tensors, base):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][TOKENS] = base[name][TOKENS].to(tensors[name].dtype)


def lose_token_rows_of_head(tensors, base):
    tensors["lm_head.weight"][TOKENS] = base["lm_head.weight"][TOKENS].to(tensors["lm_head.weight"].dtype)


def round_twice(tensors, base):
    """Store weights that were rounded to fewer bits on the way: bfloat16 within float32, float8 within bfloat16."""
    for name, tensor in tensors.items():
        coarse = torch.bfloat16 if tensor.dtype == torch.float32 else torch.float8_e4m3fn
        tensors[name] = tensor.to(coarse).to(tensor.dtype)


def scale_norm(tensors, base):
    tensors[f"{LAYER}.post_attention_layernorm.weight"] *= 1.1


def shift_head(tensors, base):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


def lose_magnitude(tensors, base):
    """Leave out DoRA's scales: every row keeps the length that it had in the base."""
    name = f"{LAYER}.self_attn.v_proj.weight"
    own, tensor = base[name].float(), tensors[name].float()
    tensors[name] = (tensor * (own.norm(dim=1) / tensor.norm(dim=1)).unsqueeze(1)).to(tensors[name].dtype)


FAULTS = {
    "none": lambda folder, base: None,
    "adapter": edit_weights(lose_adapter),
    "scale": edit_weights(scale_adapter),
    "layers": edit_weights(swap_layers),
    "transposed": edit_weights(transpose),
    "bit": edit_weights(flip_bit),
    "bias": edit_weights(lose_bias),
    "rope_theta": edit_config(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "eps": edit_config(rms_norm_eps=1e-3),
    "tokens": edit_weights(lose_token_rows),
    "tokens of the head": edit_weights(lose_token_rows_of_head),
    "dtype": edit_weights(round_twice),
    "norm": edit_weights(scale_norm),
    "head": edit_weights(shift_head),
    "magnitude": edit_weights(lose_magnitude),
    "activation": edit_config(hidden_act="gelu"),
}
# A fault that is smaller than the rounding of its type cannot be seen in logits. The comparison of tensors finds this one.
UNSEEN = {("none", "float32"), ("none", "bfloat16"), ("bit", "bfloat16")}
CASES = [(fault, "float32") for fault in FAULTS]
CASES += [(fault, "bfloat16") for fault in ("none", "scale", "transposed", "bit", "bias", "rope_theta", "dtype")]


def is_refused(comparison, dtype):
    try:
        check_comparison(comparison, dtype)
    except ExportError:
        return True
    return False


@pytest.mark.parametrize(("fault", "dtype"), CASES)
def test_layers_give_the_figures_and_the_verdict_of_whole_models(subject, exports, trained, tmp_path, fault, dtype):
    """A fixed KL of 0.02 let the transposed matrix, the lost biases and the other rope_theta pass in bfloat16."""
    export, merged = exports[dtype]
    folder = shutil.copytree(export, tmp_path / "damaged")
    FAULTS[fault](folder, subject.base)
    layers = compare_logits(folder, subject, merged)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = run_rows(model, cut_rows(list_rows(subject)), batches=False).logits
    figures = {
        "max_abs": measure_difference(trained, logits),
        "kl": measure_kl(trained, logits),
        "top1_agreement": measure_agreement(trained, logits),
    }
    for name, value in figures.items():
        assert getattr(layers, name) == pytest.approx(value, rel=1e-3, abs=2e-5), name
    whole = replace(layers, **figures)
    expected = (fault, dtype) not in UNSEEN
    assert (is_refused(layers, merged.dtype), is_refused(whole, merged.dtype)) == (expected, expected)


def test_a_folder_that_transformers_misses_tensors_in_is_refused(subject, exports, tmp_path):
    export, merged = exports["float32"]
    folder = shutil.copytree(export, tmp_path / "damaged")
    edit_weights(lambda tensors, base: tensors.pop(f"{LAYER}.self_attn.v_proj.bias"))(folder, subject.base)
    with pytest.raises(
        ExportError,
        match=r"transformers does not find its tensors .*missing_keys: model.layers.1.self_attn.v_proj.bias",
    ):
        compare_logits(folder, subject, merged)
