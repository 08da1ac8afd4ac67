"""Read a LoRA adapter in PEFT's format for a base; whatever cannot be merged is refused by its name."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from finetune.errors import ExportError, describe_count
from finetune.exporting.adapters.adapter_changes import Adapter, Change
from finetune.exporting.adapters.adapter_targets import (
    find_trained_tokens,
    list_lora_modules,
    list_replaced,
    list_token_tables,
)
from finetune.models.adapter_config import check_language_adapter, read_adapter_config
from finetune.runs.run_files import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE
from finetune.yulan.llama_files import EMBEDDING, HEAD
from finetune.yulan.tensors import TensorFolder, read_header

Shapes = Mapping[str, tuple[int, ...]]
_PREFIX = "base_model.model."
# Keys of an adapter's configuration that say how it was trained, not what it computes. PEFT ignores fan_in_fan_out for linear layers.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
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
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "unsloth_fixed",
        "unsloth_version",
        "velora_config",
    ]
)
_KNOWN = frozenset(["alpha_pattern", "bias", "lora_alpha", "lora_bias", "r", "rank_pattern", "use_dora", "use_rslora"])
# These initializations leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it before training.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_SUFFIXES = {
    ".lora_A.weight": ("weight", "a"),
    ".lora_B.weight": ("weight", "b"),
    ".lora_B.bias": ("bias", "bias_delta"),
    ".lora_magnitude_vector": ("weight", "magnitude"),
    ".lora_embedding_A": ("weight", "embedding_a"),
    ".lora_embedding_B": ("weight", "embedding_b"),
    ".token_adapter.trainable_tokens_delta": ("weight", "token_rows"),
    # Beside an adapted table PEFT stores the table itself, and beside an adapted layer its trained bias.
    ".base_layer.weight": ("weight", "copy"),
    ".base_layer.bias": ("bias", "replacement"),
}
# Where modules_to_save are stored a second time, PEFT reads the one under the module's own name.
_DOUBLES = (".modules_to_save.weight", ".original_module.weight")
_SHOWN = 8


def read_adapter(folder: Path, base: TensorFolder, shapes: Shapes | None = None) -> Adapter:
    """Read an adapter and check that it fits the base that it will be merged into.

    `shapes` are those of the model's tensors, where they are not just the base's: a tied head has no tensor of its own.

    Raises:
        ExportError: a file is missing, the kind of adapter is unknown, or tensors do not fit; the message lists the faults.
    """
    shapes = shapes or {name: base.shape(name) for name in base.names}
    config = read_adapter_config(folder)
    check_language_adapter(folder, config)
    stored = _open_weights(folder)
    # Where the configuration asks for what cannot be merged, the tensors are no fault of their own.
    faults = [*_list_config_faults(config), *_list_name_faults(stored)]
    changes: dict[str, Change] = {}
    if not faults:
        changes, faults = _read_changes(stored, shapes)
        faults += _list_count_faults(config, changes, shapes)
        for name, change in changes.items():
            faults += _complete_change(name, change, config, shapes[name])
        faults += _list_table_faults(changes, shapes)
    if not changes and not faults:
        faults.append("the adapter holds no tensors")
    if faults:
        more = f"\n  … and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ExportError(f"{folder}: does not fit the base {base.folder}:\n  " + "\n  ".join(faults[:_SHOWN]) + more)
    return Adapter(folder, changes)


def _open_weights(folder: Path) -> TensorFolder:
    if not (folder / PEFT_WEIGHTS_FILE).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("adapter_model.*"))) or "none"
        raise ExportError(
            f"{folder}: holds no {PEFT_WEIGHTS_FILE} (found: {found}); only safetensors are read, save the adapter again with "
            "model.save_pretrained(..., safe_serialization=True)"
        )
    return TensorFolder(folder, read_header(folder / PEFT_WEIGHTS_FILE))


def _list_config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings of an adapter that cannot be merged."""
    init = config.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        yield (
            f"init_lora_weights is {init!r}, which changes the base before training, so this adapter does not fit the "
            "published base; convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    unknown = [key for key, value in config.items() if key not in _WITHOUT_EFFECT | _KNOWN and value]
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        unknown.append("bias")
    parameters = config.get("target_parameters") or ()
    if any(not name.endswith("weight") for name in parameters) or (parameters and config["rank_pattern"]):
        unknown.append("target_parameters")
    if unknown:
        yield f"{PEFT_CONFIG_FILE} uses {', '.join(sorted(unknown))}, which this kit cannot merge"


def _list_name_faults(stored: TensorFolder) -> Iterator[str]:
    """Yield why PEFT would load nothing of these tensors: names that it does not write, or contents that were never gathered."""
    wrong = [
        name for name in stored.names if not name.startswith(_PREFIX) or re.search(r"\.lora_[AB]\.\w+\.weight$", name)
    ]
    if wrong:
        yield (
            f"{describe_count(len(wrong), 'tensor has', 'tensors have')} names under which PEFT loads nothing (first: {wrong[0]}); it expects names such as "
            f"{_PREFIX}….lora_A.weight: save the adapter with PEFT's save_pretrained, from the model before torch.compile"
        )
    empty = [name for name in stored.names if 0 in stored.shape(name)]
    if empty:
        yield (
            f"{describe_count(len(empty), 'tensor is', 'tensors are')} empty (first: {empty[0]}): ZeRO-3 or FSDP shards were not gathered before they were "
            "saved, so the trained values are not in this folder"
        )


def _read_changes(stored: TensorFolder, shapes: Shapes) -> tuple[dict[str, Change], list[str]]:
    changes: dict[str, Change] = {}
    faults: list[str] = []
    for stored_name in stored.names:
        name, part = _split_name(stored_name)
        if (
            stored_name.endswith(_DOUBLES)
            and f"{stored_name.removesuffix(_find_double(stored_name))}.weight" in stored.entries
        ):
            continue
        if name not in shapes:
            faults.append(_describe_stranger(stored_name, name, part, shapes))
            continue
        tensor = stored.read(stored_name)
        if not tensor.is_floating_point():
            faults.append(f"{stored_name} has the type {tensor.dtype}; expected a floating-point type")
        # numpy is faster here: for each of some 800 small tensors torch would wait for its threads.
        if not numpy.isfinite(tensor.float().numpy()).all():
            faults.append(f"{stored_name} holds NaN or infinite values")
        changes.setdefault(name, Change()).parts[part] = tensor
    return changes, faults


def _find_double(stored_name: str) -> str:
    return next(suffix for suffix in _DOUBLES if stored_name.endswith(suffix))


def _describe_stranger(stored_name: str, name: str, part: str, shapes: Shapes) -> str:
    if part in ("bias_delta", "replacement") and name.removesuffix(".bias") + ".weight" in shapes:
        return f"{stored_name} belongs to {name}, and the base has no biases there, so Llama weights cannot hold it"
    return f"{stored_name} belongs to {name}, which the base does not have"


def _split_name(stored_name: str) -> tuple[str, str]:
    """Split the name of a stored tensor into the name of the model's tensor and the part of its change."""
    name = stored_name.removeprefix(_PREFIX)
    for suffix, (kind, part) in _SUFFIXES.items():
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.{kind}", part
    # PEFT stores the modules of modules_to_save whole, under their own names.
    return name, "replacement"


def _list_count_faults(config: Mapping[str, Any], changes: Mapping[str, Change], shapes: Shapes) -> Iterator[str]:
    """Yield what the configuration names and the file lacks, and LoRA that the configuration leaves out, which PEFT would drop."""
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    expected = list_lora_modules(config, matrices)
    found = {name for name, change in changes.items() if {"a", "b", "embedding_a", "embedding_b"} & set(change.parts)}
    if not expected and found:
        yield f"target_modules ({config.get('target_modules')!r}) names none of the base's layers, so PEFT would load nothing"
        return
    shifts = {name for name, change in changes.items() if "bias_delta" in change.parts}
    needed = {f"{name.removesuffix('.weight')}.bias" for name in expected & found} if config.get("lora_bias") else set()
    if lost := sorted(needed - shifts):
        yield f"lora_bias is set, but {describe_count(len(lost), 'bias is', 'biases are')} missing (first: {lost[0]})"
    tied = {HEAD} if config.get("ensure_weight_tying") else set()
    if lost := sorted(expected - found):
        named = f"of the {describe_count(len(expected), 'layer')} that {PEFT_CONFIG_FILE} names"
        yield f"{describe_count(len(lost), f'{named} has', f'{named} have')} no tensors (first: {lost[0]})"
    if left := sorted(found - expected - tied):
        yield f"holds LoRA for {describe_count(len(left), 'layer')} that its target_modules leaves out, which PEFT would drop (first: {left[0]})"
    whole = {name for name, change in changes.items() if "replacement" in change.parts}
    if lost := sorted(list_replaced(config, shapes.keys()) - whole):
        yield f"{describe_count(len(lost), 'tensor is', 'tensors are')} missing of modules_to_save or bias (first: {lost[0]})"
    rows = {name for name, change in changes.items() if "token_rows" in change.parts}
    if lost := sorted(list_token_tables(config) - rows):
        yield f"the rows of trainable_token_indices are missing for {lost[0]}"


def _complete_change(name: str, change: Change, config: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    """Fill in the scale and the tokens of a change; return the faults that are found."""
    parts = change.parts
    module = name.removesuffix(".weight").removesuffix(".bias")
    for first, second in (("a", "b"), ("embedding_a", "embedding_b")):
        if (first in parts) != (second in parts):
            return [
                f"{module}: has LoRA's {'A' if first in parts else 'B'} without its {'B' if first in parts else 'A'}"
            ]
    low_rank = parts.get("a", parts.get("embedding_a"))
    if low_rank is not None and "replacement" in parts:
        return [f"{module}: has both LoRA and a whole copy, of which PEFT would drop one"]
    if low_rank is not None or "bias_delta" in parts:
        rank = _find_pattern(config["rank_pattern"], module, config["r"])
        alpha = _find_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        change.scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        if low_rank is not None and low_rank.shape[0] != rank:
            return [f"{module}: its A has rank {low_rank.shape[0]}, {PEFT_CONFIG_FILE} says {rank}"]
    if config.get("use_dora") and low_rank is not None and "magnitude" not in parts:
        return [f"{module}: use_dora is set, but its lora_magnitude_vector is missing"]
    if "embedding_a" in parts and "magnitude" in parts:
        # DoRA scales the columns of a table, and the rows of a projection.
        parts["embedding_magnitude"] = parts.pop("magnitude")
    own = change.own_values
    if own is not None and own.dim() == 2 and name in (EMBEDDING, HEAD) and own.shape[1:] == shape[1:]:
        shape = tuple(own.shape)  # a vocabulary that was enlarged for the training
    if "token_rows" in parts:
        change.tokens = find_trained_tokens(config, module)
        if beyond := [token for token in change.tokens if not 0 <= token < shape[0]]:
            return [
                f"{module}: trainable_token_indices {beyond} lie outside the table of {describe_count(shape[0], 'token')}"
            ]
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
    "bias_delta": lambda shape, low_rank, tokens: shape,
    "replacement": lambda shape, low_rank, tokens: shape,
    "copy": lambda shape, low_rank, tokens: shape,
}


def _list_table_faults(changes: Mapping[str, Change], shapes: Shapes) -> Iterator[str]:
    """Yield a fault where only one of the two tables was enlarged."""
    rows = {}
    for name in (EMBEDDING, HEAD):
        own = changes[name].own_values if name in changes else None
        rows[name] = shapes[name][0] if own is None else own.shape[0]
    if rows[EMBEDDING] != rows[HEAD]:
        yield f"the embedding has {describe_count(rows[EMBEDDING], 'token')} and the head {rows[HEAD]:,}; both must have been enlarged"


def _find_pattern(patterns: Mapping[str, Any], module: str, default: float) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
