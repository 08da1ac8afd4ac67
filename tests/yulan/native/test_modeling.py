"""The native model against a second implementation of its formulas, and what transformers expects of a model."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.errors import CheckpointError
from finetune.yulan.folding import fold_checkpoint
from finetune.yulan.layout import list_native_tensors, parse_native_config
from finetune.yulan.native.configuration import MiniYuLanConfig, YuLanMiniConfig
from finetune.yulan.native.modeling import (
    MiniYuLanModel,
    MiniYuLanModelForCausalLM,
    YuLanMiniForCausalLM,
    YuLanMiniModel,
    load_native,
)
from finetune.yulan.native.native_loss import compute_loss

TINY = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 5_000.0,
    "scale_emb": 7.0,
    "hidden_states_shrink": "muparam",
    "ln_scale": 0.8,
    "dim_model_base_attn": 5,
    "dim_model_base_logits": 20.0,
    "z_loss": 1e-2,
    "q_proj_alpha": 0.9,
    "k_proj_alpha": 1.1,
    "v_proj_alpha": 0.8,
    "o_proj_alpha": 1.2,
    "gate_up_proj_alpha": 0.7,
    "down_proj_alpha": 1.3,
    "input_layernorm_alpha": 1.05,
    "post_attention_layernorm_alpha": 0.95,
    "norm_alpha": 1.15,
    "lm_head_alpha": 0.85,
}
SWITCHES = {
    "published": {},
    "untied": {"tie_word_embeddings": False},
    "gemma": {"rms_type": "gemma"},
    "no_wesar": {"wesar_weights": False},
    "no_norm_alpha": {"use_norm_alpha": False},
    "no_bias": {"attention_bias": False},
    "no_shrink": {"hidden_states_shrink": 1.4},
    "qk_layernorm": {"qk_layernorm": True},
    "embedding_ln": {"embedding_ln": True},
    "embedding_rmsln": {"embedding_rmsln": True, "rms_type": "gemma"},
}
DEAD_SWITCHES = {
    "embed_tokens_alpha": 3.0,
    "use_emb_alpha": True,
    "dim_model_base": 11,
    "use_liger": True,
    "gradient_checkpointing_step": 2,
    "dim_model_base_lr": 256.0,
    "num_steps_trained_before_this_epoch": 5,
    "num_epochs_trained_before_this_epoch": 1,
}


def make_model(attention="sdpa", config_class=YuLanMiniConfig, dtype=torch.float32, **changes):
    """Make a tiny model in which every parameter is random, so that no factor can be forgotten unseen."""
    config = config_class(**{**TINY, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        small = name.endswith(("_alpha", "norm.weight")) or ".norms." in name
        parameter.data = (parameter.data + noise * 0.2 if small else noise * 0.3).to(dtype)
    return model.eval()


def make_ids(rows=2, tokens=20, seed=0):
    return torch.randint(3, TINY["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))


def compute_reference(model, ids):
    """Compute the logits of one row (a list of ids) from the formulas, token by token and head by head."""
    config, weights = model.config, dict(model.state_dict())

    def alpha(name):
        return weights.get(f"{name}_alpha", torch.tensor(1.0)).reshape(())

    def rms(x, name):
        weight = weights[f"{name}.weight"] + (1 if config.rms_type == "gemma" else 0)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight * config.ln_scale

    def layer_norm(x, weight):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + config.layer_norm_eps) * weight

    def rotate(x):
        half = x.shape[-1] // 2
        frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(half, dtype=x.dtype) / half)
        angle = torch.arange(len(x), dtype=x.dtype)[:, None] * frequency
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=1
        )

    def project(a, name, head):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        bias = weights[f"{name}.bias"][rows] if config.attention_bias else 0
        out = (a @ weights[f"{name}.weight"][rows].T + bias) * alpha(name)
        kind = name.rpartition(".")[2][0]
        if config.qk_layernorm and kind in "qk":
            stem = name.removesuffix("_proj")
            out = layer_norm(out, weights[f"{stem}_layernorm.norms.{head}.weight"])
        return rotate(out) if kind in "qk" else out

    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim, groups = config.hidden_size // heads, heads // config.num_key_value_heads
    shrink = {"muparam": layers**-0.5, 1.4: 1.0}[config.hidden_states_shrink]
    future = torch.full((len(ids), len(ids)), -torch.inf, dtype=model.dtype).triu(1)
    h = weights["model.embed_tokens.weight"][ids] * config.scale_emb
    if config.embedding_ln:
        h = layer_norm(h, weights["model.embedding_layernorm.weight"])
    if config.embedding_rmsln:
        h = rms(h, "model.embedding_layernorm")
    for layer in range(layers):
        at = f"model.layers.{layer}"
        a = rms(h, f"{at}.input_layernorm") * alpha(f"{at}.input_layernorm")
        mixed = []
        for head in range(heads):
            q = project(a, f"{at}.self_attn.q_proj", head)
            k, v = (project(a, f"{at}.self_attn.{kind}_proj", head // groups) for kind in "kv")
            scores = q @ k.T * math.sqrt(config.dim_model_base_attn) / head_dim + future
            mixed.append(scores.softmax(-1) @ v)
        out = torch.cat(mixed, dim=1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        h = h + shrink * alpha(f"{at}.self_attn.o_proj") * out
        m = rms(h, f"{at}.post_attention_layernorm") * alpha(f"{at}.post_attention_layernorm")
        m = m * alpha(f"{at}.gate_up_proj")
        gate, up = (m @ weights[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        out = (gate * torch.sigmoid(gate) * up) @ weights[f"{at}.mlp.down_proj.weight"].T
        h = h + shrink * alpha(f"{at}.down_proj") * out
    top = rms(h, "model.norm") * alpha("model.norm") * alpha("lm_head")
    return top @ weights["lm_head.weight"].T * config.dim_model_base_logits / config.hidden_size


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_logits_follow_the_formulas(switch, attention):
    model = make_model(attention, dtype=torch.float64, **SWITCHES[switch])
    ids = make_ids()
    with torch.no_grad():
        logits = model(ids).logits
    for row, expected_ids in zip(logits, ids, strict=True):
        expected = compute_reference(model, expected_ids)
        # RoPE's tables, and the softmax of eager attention, are float32 in transformers.
        torch.testing.assert_close(row, expected, atol=2e-5 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("switch", SWITCHES)
def test_parameters_are_the_published_tensors(switch, tmp_path):
    model = make_model(**SWITCHES[switch])
    model.save_pretrained(tmp_path)
    expected = list_native_tensors(model.config.read_native(tmp_path))
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    # q, k, v and o alphas are vectors of one, all others scalars.
    vectors = {name for name in expected if name.endswith("_alpha") and "self_attn" in name}
    assert written == {name: (1,) if name in vectors else shape for name, shape in expected.items()}
    assert ("lm_head.weight" in written) == (switch == "untied")


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    ("config_class", "model_class", "inner_class"),
    [
        (YuLanMiniConfig, YuLanMiniForCausalLM, YuLanMiniModel),
        (MiniYuLanConfig, MiniYuLanModelForCausalLM, MiniYuLanModel),
    ],
)
def test_round_trip_through_plain_transformers(config_class, model_class, inner_class, switch, tmp_path):
    model = make_model(config_class=config_class, dtype=torch.bfloat16, **SWITCHES[switch])
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(again) is model_class
    assert type(AutoConfig.from_pretrained(tmp_path / "first")) is config_class
    inner = AutoModel.from_pretrained(tmp_path / "first")
    assert type(inner) is inner_class
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(inner.state_dict()[name], tensor), name
    again.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert first["architectures"] == [model_class.__name__]
    assert first["model_type"] == config_class.model_type
    assert first["rope_theta"] == 5_000.0
    assert first["rope_scaling"] is None
    assert first["torch_dtype"] == "bfloat16"
    assert not {"rope_parameters", "dtype", "pad_token_id"} & first.keys()
    assert first["hidden_states_shrink"] == SWITCHES[switch].get("hidden_states_shrink", "muparam")


def test_alphas_load_in_either_shape(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    swapped = {
        name: tensor.reshape(() if tensor.dim() else (1,)).clone() if name.endswith("_alpha") else tensor
        for name, tensor in weights.items()
    }
    assert sum(swapped[name].shape != weights[name].shape for name in weights) == 3 * 8 + 2
    save_file(swapped, tmp_path / "model.safetensors", {"format": "pt"})
    for again in (load_native(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        for name, tensor in model.state_dict().items():
            assert again.state_dict()[name].shape == tensor.shape, name
            assert torch.equal(again.state_dict()[name], tensor), name


def test_a_stray_comma_loads(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}").rstrip() + ",\n}\n")
    with pytest.raises(OSError, match="not a valid JSON"):
        AutoConfig.from_pretrained(tmp_path)
    again = load_native(tmp_path)
    ids = make_ids()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is set"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is set"),
        ({"use_sliding_window": True}, "a sliding window is set"),
        ({"sliding_window": 4096}, "a sliding window is set"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rms_type": "t5"}, "rms_type is 't5'"),
        ({"embedding_ln": True, "embedding_rmsln": True}, "embedding_ln and embedding_rmsln are both true"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 4"),
        ({"q_proj_alpha": "small"}, "q_proj_alpha must be a number; found 'small'"),
        ({"z_loss": None}, "z_loss must be a number; found None"),
    ],
)
def test_what_cannot_work_is_refused(changes, reason):
    with pytest.raises(CheckpointError, match=f"config.json: {reason}"):
        YuLanMiniConfig(**{**TINY, **changes})


@pytest.mark.parametrize("key", [*TINY, "tie_word_embeddings", "wesar_weights", "rms_type", "attention_bias"])
def test_absent_keys_mean_what_the_fold_takes_them_for(key, tmp_path):
    """A configuration that leaves a key out must not give one arithmetic here and another in the fold."""
    content = {**TINY, "tie_word_embeddings": True, "wesar_weights": True, "rms_type": "llama", "attention_bias": True}
    del content[key]
    try:
        expected = parse_native_config(content, tmp_path)
    except CheckpointError:
        return  # the sizes: no published file lacks them
    assert YuLanMiniConfig(**content).read_native(tmp_path) == expected


def test_load_native_names_the_folder_in_what_it_refuses(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.down_proj_alpha"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.layers\.1\.down_proj_alpha\)") as caught:
        load_native(tmp_path)
    assert str(tmp_path) in str(caught.value)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "llama"}))
    with pytest.raises(
        CheckpointError, match="model_type is 'llama'; the native architecture is yulanmini or miniyulan"
    ):
        load_native(tmp_path)


@pytest.mark.parametrize(("key", "value"), DEAD_SWITCHES.items())
def test_dead_switches_change_nothing_and_are_kept(key, value):
    ids = make_ids()
    model = make_model(**{key: value})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
    assert model.config.to_diff_dict()[key] == value


def make_speaker(attention="sdpa", switch="published"):
    """Make a model that does not repeat its last token: the share of the embedding in its states is small."""
    return make_model(
        attention,
        **{"scale_emb": 0.3, "tie_word_embeddings": not switch.startswith(("qk", "embedding")), **SWITCHES[switch]},
    )


def generate(model, ids, mask=None, tokens=16, **options):
    """Decode greedily and return only what is new, (rows, tokens)."""
    mask = torch.ones_like(ids) if mask is None else mask
    new = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return new[:, ids.shape[1] :]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("switch", ["published", "qk_layernorm"])
def test_generation_with_cache_equals_without(switch, attention):
    model, ids = make_speaker(attention, switch), make_ids()
    cached = generate(model, ids, tokens=32, use_cache=True)
    assert cached.shape == (2, 32)
    assert len(cached.unique()) >= 20
    assert torch.equal(cached, generate(model, ids, tokens=32, use_cache=False))
    with torch.no_grad():  # the last token of a plain forward pass is the first generated one
        assert torch.equal(model(ids).logits[:, -1].argmax(-1), cached[:, 0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_returned_cache_goes_on_where_it_ended(attention):
    model, ids = make_model(attention), make_ids()
    with torch.no_grad():
        expected = model(ids).logits
        cache = model(ids[:, :13], use_cache=True).past_key_values
        assert cache.get_seq_length() == 13
        rest = model(ids[:, 13:], past_key_values=cache).logits
    assert (rest - expected[:, 13:]).abs().max() <= 1e-5 * expected.std()
    with torch.no_grad():
        assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_batch_equals_one_by_one(attention):
    model = make_speaker(attention)
    prompts = [make_ids(1, length, seed=length) for length in (5, 11, 17)]
    batch = torch.cat([functional.pad(ids, (17 - ids.shape[1], 0)) for ids in prompts])
    mask = torch.cat([functional.pad(torch.ones_like(ids), (17 - ids.shape[1], 0)) for ids in prompts])
    together = generate(model, batch, mask, tokens=32)
    for row, ids in zip(together, prompts, strict=True):
        assert torch.equal(row, generate(model, ids, tokens=32)[0])
    # The mask matters: without it the shortest prompt goes on differently.
    assert not torch.equal(together[0], generate(model, batch, tokens=32)[0])


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "qk_layernorm"])
def test_greedy_tokens_equal_the_folded_llama(switch, tmp_path):
    model = make_speaker(switch=switch)
    model.save_pretrained(tmp_path / "native")
    fold_checkpoint(tmp_path / "native", tmp_path / "llama")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    ids = make_ids(4, 9)
    tokens = generate(model, ids, tokens=64)
    assert torch.equal(tokens, generate(llama, ids, tokens=64))
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    assert len(tokens.unique()) >= 20


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"attention_mask": torch.ones(1, 20)}])
def test_packed_documents_equal_separate_rows(options, attention):
    model = make_model(attention)
    ids = make_ids(1, 20)
    positions = torch.cat([torch.arange(7), torch.arange(12), torch.arange(1)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, **options).logits
        separate = torch.cat([model(ids[:, at]).logits for at in (slice(0, 7), slice(7, 19), slice(19, 20))], dim=1)
        leaking = model(ids).logits
    assert (packed - separate).abs().max() <= 1e-5 * separate.std()
    assert (leaking - separate)[:, 7:].abs().max() > 0.1 * separate.std()


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_shrink_alpha_scales_only_the_embeddings_gradient(scale):
    ids = make_ids()
    plain, shrunk = (make_model(tie_word_embeddings=False, shrink_alpha=alpha) for alpha in (1, scale))
    outputs = [model(ids, labels=ids) for model in (plain, shrunk)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), shrunk.parameters(), strict=True):
        expected = parameter.grad * scale if name == "model.embed_tokens.weight" else parameter.grad
        assert expected is not None
        torch.testing.assert_close(other.grad, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"shrink_alpha": 1.5}, {"shrink_alpha": 0.3, "wesar_weights": False}])
def test_shrink_alpha_is_off_where_the_published_class_has_it_off(changes):
    without = {key: value for key, value in changes.items() if key != "shrink_alpha"}
    grads = []
    for model in (make_model(**changes), make_model(**without)):
        model(make_ids(), labels=make_ids()).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*grads)


def test_loss_is_cross_entropy_with_the_z_term():
    model = make_model()
    ids, labels = make_ids(2, 6), make_ids(2, 6)
    labels[0, :3] = labels[1, 4] = -100
    output = model(ids, labels=labels)
    terms = []
    for row, wanted in zip(output.logits.detach().double(), labels, strict=True):
        for logits, target in zip(row[:-1], wanted[1:], strict=True):
            if target != -100:
                lse = torch.log(torch.exp(logits).sum())
                terms.append(float(lse - logits[target] + 1e-2 * lse**2))
    assert len(terms) == 7
    assert output.loss.item() == pytest.approx(sum(terms) / 7, rel=1e-6)
    # Under gradient accumulation the Trainer divides by the tokens of the whole step.
    assert model(ids, labels=labels, num_items_in_batch=70).loss.item() == pytest.approx(sum(terms) / 70, rel=1e-6)
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    same = compute_loss(output.logits, labels, 1e-2, shift_labels=shifted)
    assert same.item() == output.loss.item()


# transformers renamed the switch in the middle of the range that we allow.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_gives_the_same_gradients(attention):
    ids, grads = make_ids(), []
    for checkpointing in (False, True):
        model = make_model(attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + checkpointing
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_equal_finite_differences(switch):
    model = make_model(dtype=torch.float64, num_hidden_layers=2, **SWITCHES[switch])
    ids = make_ids(1, 8)
    model(ids, labels=ids).loss.backward()
    generator = torch.Generator().manual_seed(3)
    step = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses, value = [], parameter.data
        for sign in (1, -1):
            parameter.data = value + sign * step * direction
            with torch.no_grad():
                losses.append(model(ids, labels=ids).loss.item())
        parameter.data = value
        numeric = (losses[0] - losses[1]) / (2 * step)
        analytic = (parameter.grad * direction).sum().item()
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-8), name


def test_initial_weights_follow_the_published_ones():
    config = YuLanMiniConfig(
        **{**TINY, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}, initializer_range=5e-5
    )
    torch.manual_seed(0)
    model = YuLanMiniForCausalLM(config)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.endswith("_alpha"):
            assert parameter.unique().item() == pytest.approx(TINY[leaf], rel=1e-7), name
        elif leaf == "bias":
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(5e-5, rel=0.05), name
            assert abs(parameter.mean().item()) < 5e-6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gemma = YuLanMiniForCausalLM(YuLanMiniConfig(**TINY, rms_type="gemma"))
    assert not gemma.model.norm.weight.any()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Written out for width 128, base 32, 3 layers, range 0.02: q/k/v/gate/up, o/down, lm_head, embedding.
        ({"model_reproduce": "transformer"}, (0.02, 0.02, 0.02, 1.0)),
        ({"model_reproduce": "cerebras"}, (0.01, 0.02 / math.sqrt(2 * 4 * 3), 0.005, 1.0)),
        ({"model_reproduce": "minicpm"}, (0.01, 0.01, 0.005, 1.0)),
        ({"model_reproduce": "minicpm", "dim_model_base_init": None, "init_scale_o": 4.0}, (0.02, 0.005, 0.005, 1.0)),
    ],
)
def test_initial_sizes_of_mup(changes, expected):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 500, "tie_word_embeddings": False}
    switches = {"initializer_range": 0.02, "dim_model_base_init": 32, "dim_model_base_lmh": 16, "init_scale_o": 1}
    model = YuLanMiniForCausalLM(YuLanMiniConfig(**{**TINY, **sizes, **switches, **changes}))
    inner, outer, head, table = expected
    layer = model.model.layers[1]
    found = {
        inner: [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        outer: [layer.self_attn.o_proj, layer.mlp.down_proj],
        head: [model.lm_head],
        table: [model.model.embed_tokens],
    }
    for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
        assert module.weight.std().item() == pytest.approx(inner, rel=0.05)
    for std, modules in found.items():
        for module in modules:
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)


def test_a_fused_head_computes_the_same_loss_and_gradients():
    """TRL multiplies the inner model's states by lm_head.weight itself; it knows neither lm_head_alpha nor the scale."""
    ids, grads, losses = make_ids(), [], []
    for fused in (False, True):
        model = make_model(z_loss=0.0)
        if fused:
            add_fused_lm_head(model)
        output = model(input_ids=ids, labels=ids, **({"fused_lm_head": True} if fused else {}))
        loss = -output.log_probs.sum() / (ids.numel() - len(ids)) if fused else output.loss
        loss.backward()
        losses.append(loss.item())
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_copy_uses_its_own_head_factor():
    model, ids = make_model(), make_ids()
    twin = copy.deepcopy(model)
    twin.lm_head_alpha.data *= 2
    with torch.no_grad():
        before, after = model(ids).logits, twin(ids).logits
    torch.testing.assert_close(after, before * 2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by PEFT
def test_an_adapter_is_saved_and_loaded(tmp_path):
    ids, model = make_ids(), make_model()
    with torch.no_grad():
        plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    with torch.no_grad():
        expected = adapted(ids).logits
    assert (expected - plain).abs().max() > 0.01
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_factors_in_float32_leave_the_states_in_bfloat16():
    """As `prepare_model_for_kbit_training` leaves a quantized model."""
    model = make_model(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(make_ids()).logits
        for name, parameter in model.named_parameters():
            if name.endswith("_alpha"):
                parameter.data = parameter.data.float()
        logits = model(make_ids()).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)


def test_outputs_as_a_tuple():
    model, ids = make_model(), make_ids()
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a CUDA device")
def test_flash_attention_equals_sdpa():
    pytest.importorskip("flash_attn")
    ids = make_ids().cuda()
    positions = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1).cuda()
    logits = []
    for attention in ("sdpa", "flash_attention_2"):
        model = make_model(attention, dtype=torch.bfloat16).cuda()
        with torch.no_grad():
            logits.append(model(ids, position_ids=positions, use_cache=False).logits.float())
    assert (logits[0] - logits[1]).abs().max() <= 0.1 * logits[0].std()
