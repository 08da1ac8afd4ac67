"""The fold against the logits of the authors' own arithmetic, with stock transformers on our side."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from finetune.errors import CheckpointError
from finetune.yulan.folding import fold_checkpoint

TOLERANCE = 1e-4  # of the logits' spread: 12 times a correct fold's error, 7 times below the weakest single mistake
FIXTURES = Path(__file__).parents[1] / "fixtures" / "oracle"
ALL_CASES = [
    "a_stable",
    "b_annealing",
    "c2_untied_scale10_bf16",
    "c_untied_bf16",
    "d_mup_scales",
    "e_gemma_rms",
    "f_no_wesar_no_shrink",
    "g_no_norm_alpha",
    "h2_embedding_rmsln",
    "h3_embedding_ln",
    "i_left_padded",
    "j_sharded",
    "k_packed_docs",
    "l_shrink_ge_1",
    "m_no_attention_bias",
]


def measure_error(case, folded):
    """Return the largest difference of a logit at a real token, as a share of the expected logits' spread."""
    expected = load_file(case / "expected.safetensors")
    model = LlamaForCausalLM.from_pretrained(folded, dtype=torch.float32)
    optional = {name: expected[name] for name in ("attention_mask", "position_ids") if name in expected}
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"], use_cache=False, **optional).logits
    real = expected.get("attention_mask", torch.ones_like(expected["input_ids"])).bool()
    return ((logits - expected["logits"])[real].abs().max() / expected["logits"][real].std()).item()


@pytest.mark.parametrize("name", ALL_CASES)
def test_the_fold_computes_what_the_authors_compute(shared, tmp_path, name):
    case = shared / "reference" / "oracle" / name
    fold_checkpoint(case, tmp_path / "folded", "float32")
    assert measure_error(case, tmp_path / "folded") <= TOLERANCE


@pytest.mark.parametrize("case", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_the_fold_of_the_fixtures(tmp_path, case):
    fold_checkpoint(case, tmp_path / "folded", "float32")
    assert measure_error(case, tmp_path / "folded") <= TOLERANCE


def test_what_llama_cannot_express_is_refused(shared, tmp_path):
    with pytest.raises(CheckpointError, match="qk_layernorm normalises queries and keys, which Llama cannot express"):
        fold_checkpoint(shared / "reference" / "oracle" / "h_qk_layernorm", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def change_tensor(name, factor):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] * factor
        save_file(tensors, folder / "model.safetensors")

    return change


def change_key(key, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    "mistake",
    [
        *(
            change_tensor(f"model.layers.1.{name}", 1.1)
            for name in (
                "self_attn.q_proj_alpha",
                "self_attn.q_proj.bias",
                "self_attn.k_proj.bias",
                "self_attn.v_proj.bias",
                "self_attn.o_proj_alpha",
                "gate_up_proj_alpha",
                "down_proj_alpha",
                "input_layernorm_alpha",
                "post_attention_layernorm_alpha",
            )
        ),
        change_tensor("model.norm_alpha", 1.1),
        change_tensor("lm_head_alpha", 1.1),
        *(
            change_key(*pair)
            for pair in (
                ("scale_emb", 11.0),
                ("hidden_states_shrink", 0.8),
                ("hidden_states_shrink", "muparam"),
                ("dim_model_base_attn", 64),
                ("dim_model_base_logits", 48.0),
                ("ln_scale", 0.9),
                ("rms_type", "gemma"),
                ("rope_theta", 490000.0),
            )
        ),
    ],
)
def test_every_factor_matters(tmp_path, mistake):
    """The comparison can fail: a tenth on any one factor is seen, so none can be left out."""
    case = tmp_path / "case"
    shutil.copytree(FIXTURES / "a_stable", case)
    mistake(case)
    fold_checkpoint(case, tmp_path / "folded", "float32")
    assert measure_error(case, tmp_path / "folded") > TOLERANCE


@pytest.mark.parametrize(
    "key", ["q_proj_alpha", "embed_tokens_alpha", "use_emb_alpha", "shrink_alpha", "dim_model_base"]
)
def test_dead_keys_change_nothing(tmp_path, key):
    """Initial alphas and dead switches stand in config.json; only the stored tensors count."""
    case = tmp_path / "case"
    shutil.copytree(FIXTURES / "a_stable", case)
    change_key(key, 7)(case)
    fold_checkpoint(case, tmp_path / "folded", "float32")
    assert measure_error(case, tmp_path / "folded") <= TOLERANCE


def test_sixteen_bit_weights_are_rounded_once(tmp_path):
    case = FIXTURES / "a_stable"
    fold_checkpoint(case, tmp_path / "folded", "bfloat16")
    stored, folded = load_file(case / "model.safetensors"), load_file(tmp_path / "folded" / "model.safetensors")
    layer = "model.layers.2"
    exact = stored[f"{layer}.mlp.down_proj.weight"].double() * (stored[f"{layer}.down_proj_alpha"].double() * 0.7)
    assert torch.equal(folded[f"{layer}.mlp.down_proj.weight"], exact.bfloat16())
    exact = stored["model.embed_tokens.weight"].double() * 10
    assert torch.equal(folded["model.embed_tokens.weight"], exact.bfloat16())
    assert torch.equal(folded[f"{layer}.self_attn.o_proj.bias"], torch.zeros(96, dtype=torch.bfloat16))
