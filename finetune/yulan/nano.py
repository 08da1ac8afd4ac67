"""Build `nano`: YuLan-Mini's architecture and published layout with a few million random weights.

It replaces the real base checkpoints where something must run offline on a laptop: the demo, the tests, the benchmarks. Its
tokenizer is a byte-level BPE trained on the bundled text, with the special tokens at their real ids.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from finetune.files.folders import write_folder
from finetune.files.json_files import write_json
from finetune.yulan.layout import NativeConfig, list_native_tensors, parse_native_config
from finetune.yulan.shards import StoredTensors, TensorSpec, write_shards

NANO_VERSION = 1  # a part of the cache key, like CONFIG; raise it when the code below changes what is written
_SEED = 20241217
_MAX_SHARD_BYTES = 2 * 10**9
_VOCABULARY = 1536
_SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    102: "<pad>",
    103: "<reasoning_step>",
    104: "<|start_header_id|>",
    105: "<|end_header_id|>",
    106: "<|eot_id|>",
}
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
    "hidden_size": 256,
    "hidden_states_shrink": "muparam",
    "initializer_range": 0.05,
    "input_layernorm_alpha": 1.0,
    "intermediate_size": 640,
    "k_proj_alpha": 0.5,
    "layer_norm_eps": 1e-6,
    "lm_head_alpha": 1.0,
    "ln_scale": 1,
    "max_position_embeddings": 2048,
    "model_type": "miniyulan",
    "norm_alpha": 1.0,
    "num_attention_heads": 4,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 2,
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
    "vocab_size": _VOCABULARY,
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
        _write_tokenizer(folder, _read_texts(text_files))
        weights = _make_weights(config)
        specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()]
        write_shards(folder, specs, StoredTensors(weights), _MAX_SHARD_BYTES)


def _make_weights(config: NativeConfig) -> dict[str, torch.Tensor]:
    """Draw every tensor from one seeded generator; a matrix times its alpha has the usual standard deviation 1/sqrt(fan in).

    WeSaR draws all matrices with the same small standard deviation, and puts their scales into the alphas.
    Source: WeSaR (arXiv 2410.05052); the published configurations.
    """
    generator = torch.Generator().manual_seed(_SEED)
    spread = float(CONFIG["initializer_range"])
    weights: dict[str, torch.Tensor] = {}
    for name, shape in list_native_tensors(config).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith("_alpha"):
            weights[name] = _make_alpha(name, config, spread)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * spread
    return weights


def _make_alpha(name: str, config: NativeConfig, spread: float) -> torch.Tensor:
    if name == "lm_head_alpha":
        # The last hidden states are normalised, so the logits have a standard deviation of about 1 and the first loss is near
        # ln(vocabulary).
        return torch.tensor(1 / (math.sqrt(config.hidden_size) * spread))
    if "norm" in name:
        return torch.tensor(1.0)
    fan_in = config.intermediate_size if name.endswith("down_proj_alpha") else config.hidden_size
    alpha = 1 / (math.sqrt(fan_in) * spread)
    # The published layout stores the attention's alphas with the shape [1], all others as scalars.
    return torch.tensor([alpha]) if "self_attn" in name else torch.tensor(alpha)


def _write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [_SPECIAL_TOKENS.get(number, f"<reserved_{number}>") for number in range(max(_SPECIAL_TOKENS) + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in reserved],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    write_json(folder / "tokenizer_config.json", content)
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 106], "pad_token_id": 102}
    write_json(folder / "generation_config.json", tokens)


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
