"""The published layout of a YuLan-Mini checkpoint: its configuration, and the names and shapes of its tensors.

Source: the authors' configuration files and model classes (RUC-GSAI/YuLan-Mini, and the remote code of their checkpoints).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import CheckpointError
from finetune.yulan.tensors import TensorFolder

NATIVE_TYPES = ("yulanmini", "miniyulan")
Architecture = Literal["llama", "yulanmini"]
Shape = tuple[int, ...]
SCALAR: Shape = ()  # published with the shape [] or [1]; the kit reads both

_MOST_LAYERS, _LARGEST_SIZE = 1_000, 1 << 24

# A comma before a closing bracket, as in Before-Annealing's config.json. Strings are matched first, so that they are kept.
_STRING_OR_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(\s*[}\]])')


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `config.json`; accept stray commas, with which one was published.

    Raises:
        CheckpointError: there is no configuration, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        reason = "there is no such folder" if not folder.is_dir() else "holds no config.json, so it is not a checkpoint"
        raise CheckpointError(f"{folder}: {reason}")
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(_STRING_OR_COMMA.sub(lambda match: match[1] or match[2], text))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold an object; found {type(config).__name__}")
    return config


def find_architecture(folder: Path) -> Architecture:
    """Return the architecture in which a checkpoint is stored: Llama or native. Remote code is never run.

    Raises:
        CheckpointError: it is another architecture.
    """
    model_type = read_config(folder).get("model_type")
    if model_type == "llama":
        return "llama"
    if model_type in NATIVE_TYPES:
        return "yulanmini"
    raise CheckpointError(
        f"{folder / 'config.json'}: model_type is {model_type!r}; this kit reads llama, {' and '.join(NATIVE_TYPES)}"
    )


# The sizes that all published checkpoints share, as a Llama configuration. Source: their config.json.
PUBLISHED_SIZES: Mapping[str, int | bool] = {
    "vocab_size": 99_000,
    "hidden_size": 1_920,
    "intermediate_size": 4_800,
    "num_hidden_layers": 56,
    "num_attention_heads": 30,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 28_723,
    "pad_token_id": 102,
}


@dataclass(frozen=True)
class NativeConfig:
    """The values of a published configuration that the forward pass depends on.

    `residual_scale` is the factor on both residual branches, 1 where the configuration sets none. Keys without an effect on the
    forward pass (`embed_tokens_alpha`, `use_emb_alpha`, `dim_model_base`, the initial `*_alpha` values) are left out on purpose.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    layer_norm_eps: float
    scale_emb: float
    ln_scale: float
    residual_scale: float
    dim_model_base_attn: float
    dim_model_base_logits: float
    gemma_norm: bool
    wesar: bool
    norm_alphas: bool
    attention_bias: bool
    tied: bool
    qk_layernorm: bool
    embedding_norm: Literal["none", "rms", "layer"]


def parse_native_config(config: Mapping[str, Any], source: Path) -> NativeConfig:
    """Read the published keys of a configuration, and report all faults in one message.

    Raises:
        CheckpointError: keys are missing or have impossible values, or set something that the published model class cannot compute.
    """
    reader = _ConfigReader(config)
    hidden, heads = reader.read_int("hidden_size"), reader.read_int("num_attention_heads")
    layers = reader.read_int("num_hidden_layers")
    head_dim = hidden // heads if heads and hidden % heads == 0 else 0
    if not head_dim:
        reader.faults.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    pairs = config.get("num_key_value_heads")
    if isinstance(pairs, int) and pairs > 0 and heads % pairs:
        reader.faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {pairs}")
    if config.get("rope_scaling") is not None:
        reader.faults.append("rope_scaling is set, which the published model class cannot compute")
    if config.get("use_sliding_window") or config.get("sliding_window") is not None:
        reader.faults.append("a sliding window is set, which the published model class cannot compute")
    if config.get("hidden_act", "silu") != "silu":
        reader.faults.append(f"hidden_act is {config['hidden_act']!r}; it must be silu")
    if config.get("rms_type", "llama") not in ("llama", "gemma"):
        reader.faults.append(f"rms_type is {config['rms_type']!r}; it must be llama or gemma")
    if config.get("embedding_ln") and config.get("embedding_rmsln"):
        reader.faults.append("embedding_ln and embedding_rmsln are both true; the published model class has one norm")
    wesar = bool(config.get("wesar_weights", True))
    native = NativeConfig(
        vocab_size=reader.read_int("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.read_int("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=reader.read_int("num_key_value_heads"),
        head_dim=head_dim,
        max_positions=reader.read_int("max_position_embeddings"),
        rope_theta=reader.read_float("rope_theta", 10_000.0),
        rms_norm_eps=reader.read_float("rms_norm_eps", 1e-6),
        layer_norm_eps=reader.read_float("layer_norm_eps", 1e-6),
        scale_emb=reader.read_float("scale_emb", 1.0),
        ln_scale=reader.read_float("ln_scale", 1.0),
        residual_scale=_read_residual_scale(reader, layers),
        dim_model_base_attn=reader.read_float("dim_model_base_attn", head_dim),
        dim_model_base_logits=reader.read_float("dim_model_base_logits", hidden),
        gemma_norm=config.get("rms_type", "llama") == "gemma",
        wesar=wesar,
        norm_alphas=wesar and bool(config.get("use_norm_alpha", True)),
        attention_bias=bool(config.get("attention_bias", True)),
        tied=bool(config.get("tie_word_embeddings", True)),
        qk_layernorm=bool(config.get("qk_layernorm", False)),
        embedding_norm="rms" if config.get("embedding_rmsln") else "layer" if config.get("embedding_ln") else "none",
    )
    if reader.faults:
        raise CheckpointError(f"{source / 'config.json'}: {'; '.join(reader.faults)}")
    return native


def _read_residual_scale(reader: "_ConfigReader", layers: int) -> float:
    value = reader.config.get("hidden_states_shrink", 1.0)
    if value == "muparam":
        return 1.0 / math.sqrt(layers) if layers else 1.0
    scale = reader.read_float("hidden_states_shrink", 1.0)
    # The published class applies the factor only in this range, and otherwise none.
    return scale if 0 <= scale < 1 else 1.0


class _ConfigReader:
    """Read the keys of a configuration and collect all faults, instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.faults: list[str] = []

    def read_int(self, key: str) -> int:
        value = self.config.get(key)
        limit = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            self.faults.append(f"{key} must be a whole number from 1 to {limit:,}; found {value!r}")
            return 0
        return value

    def read_float(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.faults.append(f"{key} must be a number; found {value!r}")
            return default
        return float(value)


def list_native_tensors(config: NativeConfig) -> dict[str, Shape]:
    """Return the names and shapes of the published layout's tensors; `lm_head.weight` is among them only when untied."""
    width = config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    if config.embedding_norm != "none":
        shapes["model.embedding_layernorm.weight"] = (width,)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _list_layer_tensors(config).items()}
    shapes["model.norm.weight"] = (width,)
    if config.norm_alphas:
        shapes["model.norm_alpha"] = SCALAR
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    if config.wesar:
        shapes["lm_head_alpha"] = SCALAR
    return shapes


def _list_layer_tensors(config: NativeConfig) -> dict[str, Shape]:
    width, inner = config.hidden_size, config.intermediate_size
    rows = {"q": config.num_heads * config.head_dim}
    rows["k"] = rows["v"] = config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {}
    for name, extent in rows.items():
        shapes[f"self_attn.{name}_proj.weight"] = (extent, width)
        if config.attention_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (extent,)
    shapes["self_attn.o_proj.weight"] = (width, rows["q"])
    if config.qk_layernorm:
        for name, heads in (("q", config.num_heads), ("k", config.num_key_value_heads)):
            for head in range(heads):
                shapes[f"self_attn.{name}_layernorm.norms.{head}.weight"] = (config.head_dim,)
    shapes |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    shapes["mlp.down_proj.weight"] = (width, inner)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{norm}.weight"] = (width,)
        if config.norm_alphas:
            shapes[f"{norm}_alpha"] = SCALAR
    if config.wesar:
        shapes |= {f"self_attn.{name}_proj_alpha": SCALAR for name in "qkvo"}
        shapes |= {"gate_up_proj_alpha": SCALAR, "down_proj_alpha": SCALAR}
    return shapes


def check_tensors(tensors: TensorFolder, expected: Mapping[str, Shape], optional: frozenset[str] = frozenset()) -> None:
    """Compare the names and shapes of a folder's tensors with the expected ones.

    Raises:
        CheckpointError: they differ; the message names the first few of each kind of fault.
    """
    missing = [name for name in expected if name not in tensors.entries]
    unexpected = [name for name in tensors.names if name not in expected and name not in optional]
    misshapen = [
        f"{name} is {list(tensors.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors.entries and not _fits(tensors.shape(name), shape)
    ]
    faults = [
        f"{len(found)} {kind} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
        if found
    ]
    if faults:
        raise CheckpointError(f"{tensors.folder}: the tensors do not fit config.json: {'; '.join(faults)}")


def _fits(found: Shape, expected: Shape) -> bool:
    return found in (SCALAR, (1,)) if expected == SCALAR else found == expected
