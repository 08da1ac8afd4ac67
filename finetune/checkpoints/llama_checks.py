"""Check a checkpoint in Llama form before it is used: sizes that agree with each other, and all of its tensors.

Source of the names and shapes: `LlamaForCausalLM` of transformers 5.23.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError
from finetune.yulan.layout import read_config
from finetune.yulan.tensors import TensorFolder, open_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BODY = ("layers.", "embed_tokens.", "norm.")
Shapes = dict[str, tuple[int, ...]]


def open_llama_tensors(folder: Path) -> TensorFolder:
    """Open the tensors of a Llama checkpoint, under the names of `LlamaForCausalLM`, and compare them with its configuration.

    A checkpoint that was saved without its head has no `model.` before its names; transformers adds it, and so does this.

    Raises:
        CheckpointError: the sizes contradict each other, tensors are missing or misshapen, or the weights are quantized.
    """
    config = read_config(folder)
    check_sizes(config, folder)
    opened = open_tensors(folder)
    entries = {f"model.{name}" if name.startswith(_BODY) else name: entry for name, entry in opened.entries.items()}
    tensors = TensorFolder(folder, entries)
    expected = list_expected_tensors(config)
    missing = [name for name in expected if name not in entries]
    wrong = [
        f"{name} is {list(tensors.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in entries and tensors.shape(name) != shape
    ]
    for fault, names in (("lacks", missing), ("has misshapen tensors:", wrong)):
        if names:
            raise CheckpointError(
                f"{folder}: its weights do not fit config.json: it {fault} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; download it again"
            )
    return tensors


def check_sizes(config: Mapping[str, Any], folder: Path) -> None:
    """Check that the sizes of a Llama configuration can belong to one model.

    Raises:
        CheckpointError: they cannot, or the weights are quantized; the message lists the faults.
    """
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        method = kind.get("quant_method", "some method") if isinstance(kind, dict) else kind
        raise CheckpointError(
            f"{folder}: its weights are quantized ({method}); give the full-precision checkpoint that they were made of"
        )
    if faults := list(_list_size_faults(config)):
        raise CheckpointError(f"{folder / 'config.json'}: {'; '.join(faults)}")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether the head of a Llama configuration is its embedding."""
    return bool(config.get("tie_word_embeddings", False))


def list_expected_tensors(config: Mapping[str, Any]) -> Shapes:
    """Return the names and shapes of the tensors that a Llama configuration needs, without the head of a tied one."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    rows, key_rows = heads * size, (config.get("num_key_value_heads") or heads) * size
    shapes: Shapes = {EMBEDDING: (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        matrices = {
            "q_proj": (rows, width),
            "k_proj": (key_rows, width),
            "v_proj": (key_rows, width),
            "o_proj": (width, rows),
        }
        shapes |= _name_layers(f"{prefix}.self_attn", matrices, bool(config.get("attention_bias")))
        matrices = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        shapes |= _name_layers(f"{prefix}.mlp", matrices, bool(config.get("mlp_bias")))
    return shapes if is_tied(config) else {**shapes, HEAD: (vocabulary, width)}


def _name_layers(prefix: str, matrices: Mapping[str, tuple[int, ...]], has_bias: bool) -> Shapes:
    shapes = {f"{prefix}.{name}.weight": shape for name, shape in matrices.items()}
    if has_bias:
        shapes |= {f"{prefix}.{name}.bias": shape[:1] for name, shape in matrices.items()}
    return shapes


def _list_size_faults(config: Mapping[str, Any]) -> Iterator[str]:
    sizes = {name: config.get(name) for name in _SIZES}
    for name in ("num_key_value_heads", "head_dim"):
        if config.get(name) is not None:
            sizes[name] = config[name]
    wrong = {
        name: size for name, size in sizes.items() if isinstance(size, bool) or not isinstance(size, int) or size < 1
    }
    yield from (f"{name} must be a whole number above 0; found {size!r}" for name, size in wrong.items())
    if wrong:
        return
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if not config.get("head_dim") and width % heads:
        yield f"hidden_size {width} is not a multiple of num_attention_heads {heads}"
    pairs = config.get("num_key_value_heads") or heads
    if heads % pairs:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {pairs}"
    if (config.get("head_dim") or width // heads) % 2:
        yield f"head_dim {config.get('head_dim') or width // heads} must be even, for RoPE"
