"""Open a Llama folder for writing as GGUF: weights, configuration, tokenizer and chat template, each checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template, list_stop_tokens
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.rows import TextSample
from finetune.errors import CheckpointError, ExportError
from finetune.exporting.gguf.vocabulary import Vocabulary, read_vocabulary
from finetune.yulan.layout import find_architecture, read_config
from finetune.yulan.tensors import TensorFolder, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_GENERATION_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class LlamaFolder:
    """A Llama folder whose parts fit one another; `names` maps its tensors to llama.cpp's names, in the order of layers.

    `rows` are rows that were trained, where the run that it was made of stored any.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFolder
    names: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    rows: tuple[TextSample, ...] = ()

    @property
    def head_dim(self) -> int:
        """The values of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the folder, or the kit's where it has none."""
        return find_template("auto", self.tokenizer)

    @cached_property
    def stop_tokens(self) -> list[int]:
        """The ids of the tokens that end an answer."""
        return list_stop_tokens(self.tokenizer, self.template)


def open_llama_folder(folder: Path, rows: tuple[TextSample, ...] = ()) -> LlamaFolder:
    """Open a folder and compare its configuration, its tensors and its tokenizer with one another; `rows` were trained.

    Raises:
        CheckpointError: the folder is not a checkpoint, or it is damaged.
        ExportError: it is no Llama model that llama.cpp can run, or its tokenizer cannot be expressed there.
    """
    if find_architecture(folder) != "llama":
        raise ExportError(
            f"{folder}: is stored in the native architecture; write the Llama form first: finetune fold {folder} -o DIR"
        )
    config = read_config(folder)
    _check_config(folder, config)
    tensors = open_tensors(folder)
    names = _name_tensors(folder, config, tensors)
    # transformers makes an empty tokenizer of LlamaTokenizer's settings alone.
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no tokenizer.json, from which a GGUF file's vocabulary is made; copy it there"
        )
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(folder, tokenizer)
    if len(vocabulary.pieces) > config["vocab_size"]:
        raise ExportError(
            f"{folder}: the tokenizer has {len(vocabulary.pieces):,} tokens and the table only {config['vocab_size']:,} rows; the two "
            "do not belong together"
        )
    return LlamaFolder(folder, config, tensors, names, tokenizer, vocabulary, rows)


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what a GGUF file of the architecture `llama` cannot say.

    Raises:
        ExportError: the message lists every fault.
    """
    faults = [f"{key} is {config.get(key)!r}" for key in _SIZES if not _is_count(config.get(key))]
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act is {config['hidden_act']!r}; llama.cpp computes silu")
    kind = find_rope(config).get("rope_type", "default")
    if kind not in ("default", "linear"):
        faults.append(f"rope_type is {kind!r}; default and linear are known")
    if config.get("quantization_config"):
        faults.append("the weights are quantized already; give the folder that they were made of")
    if faults:
        raise ExportError(f"{folder / 'config.json'}: {'; '.join(faults)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def find_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's settings from either form of a configuration, with `rope_type` and `rope_theta`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return {
        **found,
        "rope_type": found.get("rope_type", found.get("type", "default")),
        "rope_theta": float(found.get("rope_theta", config.get("rope_theta", 10_000.0))),
    }


def _name_tensors(folder: Path, config: Mapping[str, Any], tensors: TensorFolder) -> dict[str, str]:
    """Return llama.cpp's names; compare names and shapes with the configuration.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    expected = _list_shapes(config)
    faults = []
    for name, shape in expected.items():
        is_optional = name.endswith(".bias") or (name == "lm_head.weight" and bool(config.get("tie_word_embeddings")))
        if name not in tensors.entries:
            faults += [] if is_optional else [f"{name} is missing"]
        elif tensors.shape(name) != shape:
            faults.append(f"{name} is {list(tensors.shape(name))}, expected {list(shape)}")
    faults += [f"{name} has no place in a Llama model" for name in tensors.names if name not in expected]
    if faults:
        more = f" … and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"{folder}: the tensors do not fit config.json: {'; '.join(faults[:4])}{more}")
    is_tied = bool(config.get("tie_word_embeddings"))
    return {
        name: _rename(name)
        for name in expected
        if name in tensors.entries and not (is_tied and name == "lm_head.weight")
    }


def _rename(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    found = _LAYER.fullmatch(name)
    assert found is not None
    return f"blk.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"


def _list_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    matrices = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (width,)
        for module, shape in matrices.items():
            shapes[f"{prefix}.{module}.weight"] = shape
            shapes[f"{prefix}.{module}.bias"] = (shape[0],)
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def remove_training_marks(template: str) -> str:
    """Return a chat template without the marks of what is trained, which only transformers knows.

    Each becomes an empty comment, so that white space around it is treated as before.
    """
    return _GENERATION_MARK.sub(lambda mark: f"{{#{mark[1]} {mark[2]}#}}", template)
