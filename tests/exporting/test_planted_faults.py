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

DTYPES = ("float32", "bfloat16")
LAYER = "model.layers.1"
TOKENS = [104, 106]


@pytest.fixture(scope="module")
def subject(tmp_path_factory, make_adapter):
    """An adapter with LoRA, token rows and DoRA's scales, on nano."""
    folder = tmp_path_factory.mktemp("planted") / "adapter"
    options = {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}, "use_dora": True}
    return open_subject(open_result(make_adapter(folder, **options)))


@pytest.fixture(scope="module", params=DTYPES)
def export(request, subject, tmp_path_factory):
    """A whole export, and what belongs to it."""
    folder = tmp_path_factory.mktemp(request.param) / "export"
    export_result(subject.result, folder, ExportSettings(request.param))
    return folder, open_merged(subject, request.param, dequantized=False)


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


# Each with whether the logits of a float32 and of a bfloat16 export show it; a fault that is smaller than the rounding is not seen.
FAULTS = {
    "none": (lambda folder, base: None, False, False),
    "adapter": (edit_weights(lose_adapter), True, True),
    "scale": (edit_weights(scale_adapter), True, True),
    "layers": (edit_weights(swap_layers), True, True),
    "transposed": (edit_weights(transpose), True, True),
    "bit": (edit_weights(flip_bit), True, False),  # the comparison of tensors finds it
    "bias": (edit_weights(lose_bias), True, True),
    "rope_theta": (
        edit_config(rope_theta=500_000.0, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
        True,
        True,
    ),
    "eps": (edit_config(rms_norm_eps=1e-3), True, True),
    "tokens": (edit_weights(lose_token_rows), True, True),
    "tokens of the head": (edit_weights(lose_token_rows_of_head), True, True),
    "dtype": (edit_weights(round_twice), True, True),
    "norm": (edit_weights(scale_norm), True, True),
    "head": (edit_weights(shift_head), True, True),
    "magnitude": (edit_weights(lose_magnitude), True, True),
    "activation": (edit_config(hidden_act="gelu"), True, True),
}


def find_fault(comparison, dtype):
    try:
        check_comparison(comparison, dtype)
    except ExportError:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_layers_give_the_figures_and_the_verdict_of_whole_models(subject, export, trained, tmp_path, fault):
    whole, merged = export
    plant, *found = FAULTS[fault]
    folder = shutil.copytree(whole, tmp_path / "damaged")
    plant(folder, subject.base)
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
    in_memory = replace(layers, **figures)
    assert [find_fault(one, merged.dtype) for one in (layers, in_memory)] == [found[merged.dtype != torch.float32]] * 2
