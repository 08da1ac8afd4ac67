"""Check a folder of Llama weights by its configuration and the headers of its files, before any library loads it.

transformers gives random values to tensors that a folder lacks, and only logs it.

Source of names, shapes and defaults: transformers, `LlamaConfig` and `LlamaForCausalLM`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.errors import CheckpointError
from finetune.yulan.layout import Shape, read_config
from finetune.yulan.tensors import TensorFolder, open_tensors

LlamaHead = Literal["language", "score", "stored"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SCORE = "score.weight"
_SCORE_CLASS = "LlamaForSequenceClassification"
_MOST_LAYERS, _LARGEST_SIZE = 1_000, 1 << 24
# What LlamaConfig takes where a configuration says nothing.
_DEFAULT_ROPE_THETA, DEFAULT_POSITIONS = 10_000.0, 2048
# Buffers that older versions stored with the weights; they are computed anew.
_BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


def check_llama(folder: Path, head: LlamaHead = "stored") -> None:
    """Check that a Llama folder holds every tensor that its configuration needs, whole and with the right shape.

    `head` is the one that will be loaded: that of a language model, one for scores (which may be new), or the one that the folder's
    own architecture has.

    Raises:
        CheckpointError: the configuration or a file is damaged, or tensors are missing, unknown or of a wrong shape.
    """
    config = read_config(folder)
    shapes = _list_tensors(config, folder)
    _check_generation_config(folder / "generation_config.json")
    tensors = open_tensors(folder)
    has_scores = _SCORE_CLASS in (config.get("architectures") or ())
    if head == "language" or (head == "stored" and not has_scores):
        if not is_tied(config):
            shapes[HEAD] = shapes[EMBEDDING]
    elif has_scores:
        shapes[_SCORE] = (tensors.shape(_SCORE)[0] if tensors.entries.get(_SCORE) else 1, int(config["hidden_size"]))
    _compare(tensors, shapes)


def open_llama_tensors(folder: Path) -> TensorFolder:
    """Open the tensors of a language model in Llama form, under the names of `LlamaForCausalLM`, after checking them.

    Raises:
        CheckpointError: see `check_llama`.
    """
    check_llama(folder, "language")
    opened = open_tensors(folder)
    if not _is_bare(opened):
        return opened
    names = {name: name if name in (HEAD, _SCORE) else f"model.{name}" for name in opened.names}
    return TensorFolder(folder, {names[name]: entry for name, entry in opened.entries.items()})


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether the head of a Llama configuration is its embedding."""
    return bool(config.get("tie_word_embeddings", False))


def ties_head(tensors: TensorFolder, *, tied: bool) -> bool:
    """Tell whether the head of a model is its embedding, where its configuration says whether it is `tied`.

    transformers keeps two tables that differ, whatever a configuration says.
    """
    return tied and (HEAD not in tensors.entries or torch.equal(tensors.read(HEAD), tensors.read(EMBEDDING)))


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's settings from either form of a configuration, with `rope_type` and `rope_theta`.

    Source: transformers 5, `convert_rope_params_to_dict`: `rope_scaling` of transformers 4 goes before `rope_parameters`.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA))
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default")), "rope_theta": theta}


def _is_bare(tensors: TensorFolder) -> bool:
    """Tell whether a folder was saved without its head: transformers then leaves out the first part of all names."""
    return not any(name.startswith("model.") for name in tensors.names)


def _compare(tensors: TensorFolder, shapes: Mapping[str, Shape]) -> None:
    is_bare = _is_bare(tensors)
    expected = {name.removeprefix("model.") if is_bare else name: shape for name, shape in shapes.items()}
    missing = [name for name in expected if name not in tensors.entries]
    unknown = [
        name
        for name in tensors.names
        if name not in expected and name not in (HEAD, _SCORE) and not name.endswith(_BUFFERS)
    ]
    misshapen = [
        f"{name} is {list(tensors.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors.entries and tensors.shape(name) != shape
    ]
    untyped = [
        f"{name} is {entry.dtype}, expected a floating-point type"
        for name, entry in tensors.entries.items()
        if name in expected and not entry.dtype.is_floating_point
    ]
    faults = [
        f"{len(found)} {kind} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in (
            ("missing", missing),
            ("unknown", unknown),
            ("of a wrong shape", misshapen),
            ("of a wrong type", untyped),
        )
        if found
    ]
    if faults:
        raise CheckpointError(
            f"{tensors.folder}: the tensors do not fit config.json: {'; '.join(faults)}; what is missing would be random: "
            "download the folder again, or save it anew"
        )


def _list_tensors(config: Mapping[str, Any], folder: Path) -> dict[str, Shape]:
    """Return names and shapes of a Llama model's tensors without its head.

    Raises:
        CheckpointError: sizes are missing, impossible, or contradict each other; the message names all of them.
    """
    faults: list[str] = []
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        method = kind.get("quant_method", "some method") if isinstance(kind, dict) else kind
        faults.append(
            f"its weights are quantized ({method}); give the full-precision checkpoint that they were made of"
        )

    def read(key: str, limit: int = _LARGEST_SIZE, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            faults.append(f"{key} must be a whole number from 1 to {limit:,}; found {value!r}")
            return 1
        return value

    width, inner, layers = read("hidden_size"), read("intermediate_size"), read("num_hidden_layers", _MOST_LAYERS)
    vocabulary, heads = read("vocab_size"), read("num_attention_heads")
    groups = read("num_key_value_heads", default=heads)
    size = read("head_dim", default=max(1, width // heads))
    read("max_position_embeddings", limit=1 << 40, default=DEFAULT_POSITIONS)
    if heads % groups:
        faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if config.get("head_dim") is None and width % heads:
        faults.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    elif size % 2:
        faults.append(f"head_dim {size} must be even, for RoPE")
    faults += _find_value_faults(config, vocabulary)
    if faults:
        raise CheckpointError(f"{folder / 'config.json'}: {'; '.join(faults)}")
    attention_bias, mlp_bias = (config.get(key) is True for key in ("attention_bias", "mlp_bias"))
    matrices = {
        "self_attn.q_proj": (heads * size, width, attention_bias),
        "self_attn.k_proj": (groups * size, width, attention_bias),
        "self_attn.v_proj": (groups * size, width, attention_bias),
        "self_attn.o_proj": (width, heads * size, attention_bias),
        "mlp.gate_proj": (inner, width, mlp_bias),
        "mlp.up_proj": (inner, width, mlp_bias),
        "mlp.down_proj": (width, inner, mlp_bias),
    }
    shapes: dict[str, Shape] = {EMBEDDING: (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (width,)
        for name, (rows, columns, has_bias) in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
    return shapes


def _find_value_faults(config: Mapping[str, Any], vocabulary: int) -> list[str]:
    """List the values, other than sizes, with which transformers would fail in the middle of loading."""
    faults = []
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(config.get(key, False), bool | None):
            faults.append(f"{key} must be true or false; found {config[key]!r}")
    for key in ("rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout"):
        value = config.get(key, 0.0)
        if value is not None and not _is_number(value):
            faults.append(f"{key} must be a number; found {value!r}")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), dict | None):
            faults.append(f"{key} must be an object or null; found {config[key]!r}")
    if not faults and not _is_number(theta := read_rope(config)["rope_theta"]):
        faults.append(f"rope_theta must be a number; found {theta!r}")
    if not isinstance(config.get("hidden_act", "silu"), str):
        faults.append(f"hidden_act must be a name; found {config['hidden_act']!r}")
    for key in ("pad_token_id", "bos_token_id"):
        token = config.get(key)
        is_number = isinstance(token, int) and not isinstance(token, bool)
        if token is not None and not (is_number and -1 <= token < vocabulary):
            faults.append(f"{key} must be a token below vocab_size {vocabulary}, or null; found {token!r}")
    architectures = config.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        faults.append(f"architectures must be a list; found {architectures!r}")
    return faults


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_generation_config(path: Path) -> None:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download it again, or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object; found {type(content).__name__}; download it again")
