"""What lies beside the weights of an export: configuration, tokenizer, one template, and the same stop tokens everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.encoding.template import list_stop_tokens
from finetune.data.encoding.tokenizer import load_tokenizer_file
from finetune.files.json_files import write_json
from finetune.yulan.folding import describe_llama_config
from finetune.yulan.layout import parse_native_config, read_config
from finetune.yulan.tensors import name_dtype
from finetune.yulan.tokenizer_files import copy_tokenizer

if TYPE_CHECKING:
    import torch

    from finetune.exporting.merged import Subject
    from finetune.runs.results import Lineage

# These belong to how the base was stored, loaded or trained once, not to the exported weights. Training with gradient
# checkpointing leaves `use_cache: false`, with which every new token would read the whole text again.
_STALE_KEYS = (
    "quantization_config",
    "auto_map",
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
)
# What LlamaConfig takes where a configuration says nothing.
_DEFAULT_ROPE_THETA = 10_000.0


def write_companions(folder: Path, subject: Subject, dtype: torch.dtype) -> None:
    """Write configuration, tokenizer with the run's template, and the tokens that stop generation.

    The tokenizer's own `eos_token` stays the base's: templates and documents are written with it. It is one of the tokens
    that both `config.json` and `generation_config.json` stop at.
    """
    copy_tokenizer(subject.tokenizer_folder, folder, subject.template.source)
    tokens = _list_special_tokens(folder, subject)
    write_json(folder / "config.json", _describe_config(subject, dtype) | tokens)
    write_json(folder / "generation_config.json", tokens)


def _list_special_tokens(folder: Path, subject: Subject) -> dict[str, Any]:
    tokenizer = load_tokenizer_file(folder)
    stops = list_stop_tokens(tokenizer, subject.template)
    end_of_turn = tokenizer.get_vocab().get("<|eot_id|>")
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted({*stops, *([] if end_of_turn is None else [end_of_turn])}),
        "pad_token_id": tokenizer.pad_token_id,
    }


def _describe_config(subject: Subject, dtype: torch.dtype) -> dict[str, Any]:
    stored = read_config(subject.base)
    if subject.architecture == "yulanmini":
        config = describe_llama_config(parse_native_config(stored, subject.base), dtype)
    else:
        config = {key: value for key, value in stored.items() if key not in _STALE_KEYS}
        config |= {
            "architectures": ["LlamaForCausalLM"],
            "dtype": name_dtype(dtype),
            "torch_dtype": name_dtype(dtype),
        }
    lineage = subject.result.lineage
    if lineage is not None and lineage.max_positions is not None:
        config["max_position_embeddings"] = lineage.max_positions
    return config | _describe_rope(config, lineage)


def _describe_rope(config: dict[str, Any], lineage: Lineage | None) -> dict[str, Any]:
    """Return RoPE's keys in both forms, with the base that the run was trained with.

    transformers 5 writes and prefers `rope_parameters`. transformers 4 and mlx-lm read `rope_theta` and `rope_scaling` only, and
    take 10,000 where there is none.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA))
    if lineage is not None and lineage.rope_theta is not None:
        theta = lineage.rope_theta
    rope = {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default")), "rope_theta": theta}
    keys: dict[str, Any] = {"rope_theta": theta, "rope_parameters": rope}
    return keys if rope["rope_type"] == "default" else {**keys, "rope_scaling": rope}
