"""The fold against the logits of the authors' own arithmetic, with stock transformers on our side."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from finetune.errors import CheckpointError
from finetune.yulan.folding import fold_checkpoint
from finetune.yulan.layout import read_config

TOLERANCE = 1e-4  # of the logits' spread: 12 times a correct fold's error, 7 times below the weakest single mistake
FIXTURES = Path(__file__).parents[1] / "fixtures" / "oracle"
FIXTURE_CASES = ["a_stable", "b_annealing", "c2_untied_scale10_bf16"]
STABLE = FIXTURES / "a_stable"
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


def test_no_case_is_left_out(shared):
    manifest = json.loads((shared / "reference" / "oracle" / "MANIFEST.json").read_text())
    assert {name for name, case in manifest.items() if case["foldable"] != "no"} == set(ALL_CASES)
    assert {case["tolerance_rel"] for case in manifest.values()} == {TOLERANCE}


@pytest.mark.parametrize("name", FIXTURE_CASES)
def test_the_fold_of_the_fixtures(tmp_path, name):
    fold_checkpoint(FIXTURES / name, tmp_path / "folded", "float32")
    assert measure_error(FIXTURES / name, tmp_path / "folded") <= TOLERANCE
    assert "auto_map" not in read_config(tmp_path / "folded")


def test_what_llama_cannot_express_is_refused(tmp_path):
    """The fixture has no weights: their tensors are never reached."""
    with pytest.raises(CheckpointError, match="qk_layernorm normalises queries and keys, which Llama cannot express"):
        fold_checkpoint(FIXTURES / "h_qk_layernorm", tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []


def set_tensor(name, change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def set_key(key, value):
    def edit(folder):
        (folder / "config.json").write_text(json.dumps({**read_config(folder), key: value}))

    return edit


def forget_alpha(name):
    """With an alpha of one, the fold computes what it would compute without that factor."""
    return set_tensor(name, lambda tensors: torch.ones_like(tensors[name]))


def forget_bias_factor(projection):
    """With b / alpha stored, the fold computes what it would compute with an unscaled bias."""
    bias = f"{projection}.bias"
    return set_tensor(bias, lambda tensors: tensors[bias] / tensors[f"{projection}_alpha"])


def list_mistakes():
    alphas = [name for name in load_file(STABLE / "model.safetensors") if name.endswith("_alpha")]
    mistakes = {name: forget_alpha(name) for name in alphas}
    projections = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(4) for name in "qkv"]
    mistakes |= {f"{projection}.bias": forget_bias_factor(projection) for projection in projections}
    keys = {"scale_emb": 1.0, "hidden_states_shrink": 1.0, "rope_theta": 490000.0, "rms_type": "gemma"}
    # These are 1 in this case: a fold that used them wrongly would differ from the authors' as one that takes another value.
    keys |= {"dim_model_base_attn": 64, "dim_model_base_logits": 48.0, "ln_scale": 0.9}
    return mistakes | {key: set_key(key, value) for key, value in keys.items()}


MISTAKES = list_mistakes()


def test_the_mistakes_are_complete():
    assert len(MISTAKES) == 4 * 8 + 2 + 4 * 3 + 7  # alphas of a layer, of the model, biases, keys


@pytest.mark.parametrize("name", MISTAKES)
def test_a_forgotten_factor_shows(tmp_path, name):
    case = tmp_path / "case"
    shutil.copytree(STABLE, case)
    MISTAKES[name](case)
    fold_checkpoint(case, tmp_path / "folded", "float32")
    assert measure_error(case, tmp_path / "folded") > 10 * TOLERANCE


@pytest.mark.parametrize(
    "key", ["q_proj_alpha", "embed_tokens_alpha", "use_emb_alpha", "shrink_alpha", "dim_model_base"]
)
def test_dead_keys_change_nothing(tmp_path, key):
    """Initial alphas and dead switches stand in config.json; only the stored tensors count."""
    case = tmp_path / "case"
    shutil.copytree(STABLE, case)
    set_key(key, 7)(case)
    fold_checkpoint(case, tmp_path / "folded", "float32")
    assert measure_error(case, tmp_path / "folded") <= TOLERANCE


def fold_by_hand(stored, config):
    """Return every Llama tensor in float64, written out product by product."""
    stored = {name: tensor.double() for name, tensor in stored.items()}
    shrink, head_dim = config["hidden_states_shrink"], config["hidden_size"] // config["num_attention_heads"]
    table = stored["model.embed_tokens.weight"]
    head = stored.get("lm_head.weight", table) * stored["lm_head_alpha"]
    folded = {
        "model.embed_tokens.weight": table * config["scale_emb"],
        "model.norm.weight": stored["model.norm.weight"] * config["ln_scale"] * stored["model.norm_alpha"],
        "lm_head.weight": head * config["dim_model_base_logits"] / config["hidden_size"],
    }
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            alpha = stored[f"{layer}.{norm}_alpha"]
            folded[f"{layer}.{norm}.weight"] = stored[f"{layer}.{norm}.weight"] * config["ln_scale"] * alpha
        for name in "qkv":
            projection = f"{layer}.self_attn.{name}_proj"
            alpha = stored[f"{projection}_alpha"]
            alpha = alpha * math.sqrt(config["dim_model_base_attn"] / head_dim) if name == "q" else alpha
            folded |= {f"{projection}.{part}": stored[f"{projection}.{part}"] * alpha for part in ("weight", "bias")}
        projection = f"{layer}.self_attn.o_proj"
        folded[f"{projection}.weight"] = stored[f"{projection}.weight"] * stored[f"{projection}_alpha"] * shrink
        folded[f"{projection}.bias"] = torch.zeros(config["hidden_size"], dtype=torch.float64)
        for name in ("gate", "up"):
            weight = stored[f"{layer}.mlp.{name}_proj.weight"]
            folded[f"{layer}.mlp.{name}_proj.weight"] = weight * stored[f"{layer}.gate_up_proj_alpha"]
        weight = stored[f"{layer}.mlp.down_proj.weight"]
        folded[f"{layer}.mlp.down_proj.weight"] = weight * (stored[f"{layer}.down_proj_alpha"] * shrink)
    return folded


@pytest.mark.parametrize(
    ("name", "dtype", "written"),
    [
        ("a_stable", "float32", torch.float32),
        ("a_stable", "bfloat16", torch.bfloat16),
        ("a_stable", "float16", torch.float16),
        ("a_stable", "auto", torch.float32),
        ("c2_untied_scale10_bf16", "auto", torch.bfloat16),
        ("c2_untied_scale10_bf16", "float32", torch.float32),
    ],
)
def test_every_tensor_is_the_exact_product_rounded_once(tmp_path, name, dtype, written):
    report = fold_checkpoint(FIXTURES / name, tmp_path / "folded", dtype)
    exact = fold_by_hand(load_file(FIXTURES / name / "model.safetensors"), read_config(FIXTURES / name))
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert folded.keys() == exact.keys()
    wrong = [name for name, tensor in exact.items() if not torch.equal(folded[name], tensor.to(written))]
    assert wrong == []
    assert (report.tensors, report.bytes) == (len(exact), sum(t.nbytes for t in folded.values()))
    assert report.dtype == str(written).removeprefix("torch.")


def test_rounding_in_between_would_show(tmp_path):
    """The comparison above can fail: most numbers differ where alpha and product are rounded one after the other."""
    name = "model.layers.2.mlp.down_proj"
    stored = load_file(STABLE / "model.safetensors")
    fold_checkpoint(STABLE, tmp_path / "folded", "bfloat16")
    folded = load_file(tmp_path / "folded" / "model.safetensors")[f"{name}.weight"]
    factor = (stored["model.layers.2.down_proj_alpha"] * 0.7).bfloat16()
    assert (stored[f"{name}.weight"].bfloat16() * factor != folded).double().mean() > 0.2


def test_shards_open_in_transformers_and_equal_one_file(tmp_path):
    fold_checkpoint(STABLE, tmp_path / "one", "float32")
    fold_checkpoint(STABLE, tmp_path / "many", "float32", max_shard_bytes=300_000)
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 4
    one, many = (LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())
    assert measure_error(STABLE, tmp_path / "many") <= TOLERANCE


def test_a_checkpoint_in_shards_folds_alike(tmp_path):
    (tmp_path / "sharded").mkdir()
    shutil.copy(STABLE / "config.json", tmp_path / "sharded")
    save_torch_state_dict(load_file(STABLE / "model.safetensors"), tmp_path / "sharded", max_shard_size=500_000)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    for source, output in ((STABLE, "one"), (tmp_path / "sharded", "other")):
        fold_checkpoint(source, tmp_path / output, "float32")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
