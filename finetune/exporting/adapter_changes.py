"""Read a LoRA adapter in PEFT's format, and merge it into base tensors one at a time.

The formulas are those of the papers: LoRA (arXiv 2106.09685), rank-stabilised scaling (arXiv 2312.03732), DoRA
(arXiv 2402.09353). An adapter with anything that this module cannot merge is refused.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from finetune.errors import ExportError
from finetune.runs.run_files import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE
from finetune.yulan.tensors import TensorFolder, read_header

_PREFIX = "base_model.model."
# Keys of an adapter's configuration that say how it was trained, not what it computes.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "velora_config",
        "monteclora_config",
    ]
)
_KNOWN = frozenset(
    ["alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora"]
)
# These initializations leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it before training.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".token_adapter.trainable_tokens_delta": "token_rows",
}


@dataclass
class _Change:
    """The parts of an adapter that change one base tensor: its matrices, their scale, and the tokens whose rows it replaces."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory; `changes` maps the name of a base tensor to its change."""

    folder: Path
    changes: Mapping[str, _Change]

    @property
    def is_empty(self) -> bool:
        """Tell whether merging changes nothing: every B is zero, and no tensor or row is replaced."""
        return all(set(change.parts) <= {"a", "b"} and not change.parts["b"].any() for change in self.changes.values())

    def needs_whole(self, name: str) -> bool:
        """Tell whether a tensor can only be merged whole: DoRA on an embedding table needs the norms of its columns."""
        return name in self.changes and "embedding_magnitude" in self.changes[name].parts

    def merge_rows(self, name: str, start: int, base: torch.Tensor) -> torch.Tensor:
        """Merge rows of a base tensor, from row `start` on; the result is float32, or the rows as given where nothing changes them."""
        change = self.changes.get(name)
        if change is None:
            return base
        parts, rows = change.parts, slice(start, start + len(base))
        if "replacement" in parts:
            return parts["replacement"][rows].float()
        merged = base.to(torch.float32, copy=True)
        if "a" in parts:
            _add_product(merged, parts["b"][rows].float(), parts["a"].float(), change.scale)
            if "magnitude" in parts:
                merged.mul_((parts["magnitude"][rows].float() / merged.norm(dim=1)).unsqueeze(1))
        if "embedding_a" in parts:
            merged = merged + change.scale * (parts["embedding_b"].float() @ parts["embedding_a"][:, rows].float()).T
            if "embedding_magnitude" in parts:
                merged = merged * (parts["embedding_magnitude"].float() / merged.norm(dim=0))
        if "token_rows" in parts:
            for token, row in zip(change.tokens, parts["token_rows"].float(), strict=True):
                if rows.start <= token < rows.stop:
                    merged[token - start] = row
        return merged


def _add_product(base: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> None:
    """Add `(b @ a) * scale` in place, with the same rounding as PEFT."""
    if math.frexp(scale)[0] == 0.5:  # scaling by a power of two does not round, so the smaller matrix can be scaled
        base.addmm_(b * scale, a)
    else:
        base.add_((b @ a).mul_(scale))


def read_adapter(folder: Path, base: TensorFolder) -> Adapter:
    """Read an adapter and check that it fits the base that it will be merged into.

    Raises:
        ExportError: a file is missing, the kind of adapter is unknown, or tensors do not fit; the message lists the faults.
    """
    config = _read_config(folder)
    stored = _open_weights(folder)
    faults = _find_config_faults(config)
    changes: dict[str, _Change] = {}
    for stored_name in stored.names:
        name, part = _split_name(stored_name)
        if name not in base.entries:
            faults.append(f"{stored_name} belongs to {name}, which the base does not have")
            continue
        tensor = stored.read(stored_name)
        # numpy is faster here: for each of some 800 small tensors torch would wait for its threads.
        if not numpy.isfinite(tensor.float().numpy()).all():
            faults.append(f"{stored_name} holds NaN or infinite values")
        changes.setdefault(name, _Change()).parts[part] = tensor
    for name, change in changes.items():
        faults += _complete_change(name, change, config, base.shape(name))
    if not changes and not faults:
        faults.append("the adapter holds no tensors")
    if faults:
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ExportError(f"{folder}: does not fit the base {base.folder}:\n  " + "\n  ".join(faults[:8]) + more)
    return Adapter(folder, changes)


def _open_weights(folder: Path) -> TensorFolder:
    if not (folder / PEFT_WEIGHTS_FILE).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("adapter_model.*"))) or "none"
        raise ExportError(
            f"{folder}: holds no {PEFT_WEIGHTS_FILE} (found: {found}); only safetensors are read, save the adapter again with "
            "model.save_pretrained(..., safe_serialization=True)"
        )
    return TensorFolder(folder, read_header(folder / PEFT_WEIGHTS_FILE))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read ({error}); give a folder that PEFT wrote") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path}: must hold an object; found {type(config).__name__}; give a folder that PEFT wrote")
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged")
    faults = [
        f"{key} is {config.get(key)!r}; expected a number above 0"
        for key in ("r", "lora_alpha")
        if not isinstance(config.get(key), int | float) or config[key] <= 0
    ]
    if faults:
        raise ExportError(f"{path}: {'; '.join(faults)}")
    return config


def _find_config_faults(config: Mapping[str, Any]) -> list[str]:
    """List the settings of an adapter that this module cannot merge."""
    faults = []
    init = config.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        faults.append(
            f"init_lora_weights is {init!r}, which changes the base before training, so this adapter does not fit the "
            "published base; convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    unknown = [key for key, value in config.items() if key not in _WITHOUT_EFFECT | _KNOWN and value]
    if config.get("bias", "none") != "none":
        unknown.append("bias")
    if config.get("fan_in_fan_out"):
        unknown.append("fan_in_fan_out")
    if unknown:
        faults.append(f"{PEFT_CONFIG_FILE} uses {', '.join(sorted(unknown))}, which this kit cannot merge")
    return faults


def _split_name(stored_name: str) -> tuple[str, str]:
    """Split the name of a stored tensor into the name of the base tensor and the part of its change."""
    name = stored_name.removeprefix(_PREFIX)
    for suffix, part in _SUFFIXES.items():
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.weight", part
    # PEFT stores the modules of modules_to_save whole, under their own names.
    return name, "replacement"


def _complete_change(name: str, change: _Change, config: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    """Fill in the scale and the tokens of a change; return the faults that are found."""
    parts = change.parts
    module = name.removesuffix(".weight")
    for first, second in (("a", "b"), ("embedding_a", "embedding_b")):
        if (first in parts) != (second in parts):
            return [
                f"{module}: has LoRA's {'A' if first in parts else 'B'} without its {'B' if first in parts else 'A'}"
            ]
    low_rank = parts.get("a", parts.get("embedding_a"))
    if low_rank is not None:
        rank = _find_pattern(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _find_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        change.scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        if low_rank.shape[0] != rank:
            return [f"{module}: its A has rank {low_rank.shape[0]}, {PEFT_CONFIG_FILE} says {rank}"]
    if config.get("use_dora") and low_rank is not None and "magnitude" not in parts:
        return [f"{module}: use_dora is set, but its lora_magnitude_vector is missing"]
    if (
        "embedding_a" in parts and "magnitude" in parts
    ):  # DoRA scales the columns of a table, and the rows of a projection
        parts["embedding_magnitude"] = parts.pop("magnitude")
    if "token_rows" in parts:
        change.tokens = _find_tokens(config.get("trainable_token_indices"), module)
        if beyond := [token for token in change.tokens if not 0 <= token < shape[0]]:
            return [f"{module}: trainable_token_indices {beyond} lie outside the table of {shape[0]:,} tokens"]
    return [
        f"{module}: {part} is {list(found)}, the base {list(shape)} needs {list(expected)}"
        for part, tensor in parts.items()
        if (found := tuple(tensor.shape)) != (expected := _SHAPES[part](shape, low_rank, change.tokens))
    ]


_SHAPES: Mapping[str, Callable[[tuple[int, ...], Any, tuple[int, ...]], tuple[int, ...]]] = {
    "a": lambda shape, low_rank, tokens: (low_rank.shape[0], shape[1]),
    "b": lambda shape, low_rank, tokens: (shape[0], low_rank.shape[0]),
    "magnitude": lambda shape, low_rank, tokens: (shape[0],),
    "embedding_a": lambda shape, low_rank, tokens: (low_rank.shape[0], shape[0]),
    "embedding_b": lambda shape, low_rank, tokens: (shape[1], low_rank.shape[0]),
    "embedding_magnitude": lambda shape, low_rank, tokens: (shape[1],),
    "token_rows": lambda shape, low_rank, tokens: (len(tokens), shape[1]),
    "replacement": lambda shape, low_rank, tokens: shape,
}


def _find_pattern(patterns: Mapping[str, Any], module: str, default: float) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _find_tokens(indices: Any, module: str) -> tuple[int, ...]:
    if isinstance(indices, Mapping):
        indices = next((tokens for key, tokens in indices.items() if module.split(".")[-1] == key.split(".")[-1]), ())
    return tuple(indices or ())
