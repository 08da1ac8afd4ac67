"""Build `nano`: YuLan-Mini's architecture and published layout with a few million random weights.

It replaces the real base checkpoints where something must run offline on a laptop: the demo, the tests, the benchmarks. It has
what makes other programs fail on the real ones: their tokenizer, their ratios (1 : 2.5 from hidden to intermediate size, five
query heads for each key and value head, heads of 64, no size a multiple of 128), biases and alphas that are all different and
never 0, and a table longer than the tokenizer.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.files.folders import write_folder
from finetune.files.json_files import write_json
from finetune.yulan.layout import NativeConfig, list_native_tensors, parse_native_config
from finetune.yulan.nano_tokenizer import write_nano_tokenizer
from finetune.yulan.shards import StoredTensors, TensorSpec, write_shards

NANO_VERSION = 4  # a part of the cache key, like CONFIG; raise it when the code below changes what is written
_SEED = 2  # of ten, it was chosen for its low untrained loss: 8.4 nats, where others have up to 13
_MATRIX_SPREAD, _NORM_SPREAD, _BIAS_SPREAD = 0.05, 0.1, 0.2  # standard deviations
_ALPHA_SPREAD = 0.2  # an alpha differs from its usual value by at most this share
_MAX_SHARD_BYTES = 2 * 10**9
_TABLE_ROWS = 1312
_TOKENS = 1296  # at most; the rows after them belong to no token
_LAYERS = 4
CONFIG: dict[str, Any] = {
    "architectures": ["MiniYuLanModelForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dim_model_base": 256,
    "dim_model_base_attn": 64,
    "dim_model_base_logits": 256.0,
    "down_proj_alpha": 0.25,
    "embed_tokens_alpha": 1,
    "embedding_ln": False,
    "embedding_rmsln": False,
    "eos_token_id": 2,
    "gate_up_proj_alpha": 0.5,
    "hidden_act": "silu",
    "hidden_size": 320,
    "hidden_states_shrink": "muparam",
    "initializer_range": _MATRIX_SPREAD,
    "input_layernorm_alpha": 1.0,
    "intermediate_size": 800,
    "k_proj_alpha": 0.5,
    "layer_norm_eps": 1e-6,
    "lm_head_alpha": 1.0,
    "ln_scale": 1,
    "max_position_embeddings": 2048,
    "model_type": "miniyulan",
    "norm_alpha": 1.0,
    "num_attention_heads": 5,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 1,
    "o_proj_alpha": 0.25,
    "post_attention_layernorm_alpha": 1.0,
    "q_proj_alpha": 0.5,
    "qk_layernorm": False,
    "rms_norm_eps": 1e-6,
    "rms_type": "llama",
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scale_emb": 10.0,
    "shrink_alpha": 1,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_emb_alpha": True,
    "use_norm_alpha": True,
    "use_sliding_window": False,
    "v_proj_alpha": 0.5,
    "vocab_size": _TABLE_ROWS,
    "wesar_weights": True,
    "z_loss": 0.0001,
}


def build_nano(output: Path, text_files: Sequence[Path]) -> None:
    """Write the nano checkpoint; the same text files always give the same bytes.

    Raises:
        OutputError: the output folder is not empty or cannot be written.
    """
    config = parse_native_config(CONFIG, output)
    with write_folder(output) as folder:
        write_json(folder / "config.json", CONFIG)
        write_nano_tokenizer(folder, _read_texts(text_files), _TOKENS, CONFIG["max_position_embeddings"])
        write_json(
            folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 106], "pad_token_id": 102}
        )
        weights = _make_weights(config)
        specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
        write_shards(folder, specs, StoredTensors(weights), _MAX_SHARD_BYTES)


def _make_weights(config: NativeConfig) -> dict[str, torch.Tensor]:
    """Draw every tensor from one seeded generator; a matrix times its alpha has about the usual standard deviation 1/sqrt(fan in).

    WeSaR draws all matrices with the same small standard deviation, and puts their scales into the alphas. Norms, biases and alphas
    are not the constants of an untrained network: each alpha differs from every other, so that none can be forgotten unseen.
    Source: WeSaR (arXiv 2410.05052); the published configurations.
    """
    generator = torch.Generator().manual_seed(_SEED)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in list_native_tensors(config).items():
        if name.endswith("norm.weight"):
            weights[name] = 1 + _NORM_SPREAD * torch.randn(shape, generator=generator)
        elif name.endswith("_alpha"):
            # The published layout stores the attention's alphas with the shape [1], all others as scalars.
            stored_shape = (1,) if "self_attn" in name else shape
            factor = 1 + _ALPHA_SPREAD * (2 * torch.rand(stored_shape, generator=generator) - 1)
            weights[name] = _find_usual_alpha(name, config) * factor
        elif name.endswith(".bias"):
            weights[name] = _BIAS_SPREAD * torch.randn(shape, generator=generator)
        else:
            weights[name] = _MATRIX_SPREAD * torch.randn(shape, generator=generator)
    return weights


def _find_usual_alpha(name: str, config: NativeConfig) -> float:
    if name == "lm_head_alpha":
        # The last hidden states are normalised, so the logits have a standard deviation of about 1, but for that of the token just
        # read, which the head shares its table with. The first loss lies above ln(vocabulary).
        return math.sqrt(config.hidden_size) / (config.dim_model_base_logits * _MATRIX_SPREAD)
    if "norm" in name:
        return 1.0
    fan_in = config.intermediate_size if name.endswith("down_proj_alpha") else config.hidden_size
    return 1 / (math.sqrt(fan_in) * _MATRIX_SPREAD)


def _read_texts(paths: Sequence[Path]) -> list[str]:
    return [
        text
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        for text in _walk_texts(json.loads(line))
    ]


def _walk_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _walk_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk_texts(inner)
