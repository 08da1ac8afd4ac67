"""Read the configuration of an adapter that PEFT wrote, and check that it is LoRA with values that can be used. Never imports torch."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.files.json_files import read_json
from finetune.files.terminal import limit_seconds
from finetune.recipe.sections import LINEAR_LAYERS
from finetune.runs.run_files import PEFT_CONFIG_FILE

# PEFT writes the second or nothing where no task was named.
_TASKS = ("CAUSAL_LM", None, "")
# A pattern such as (([a-z]+)+)+! takes longer than anybody waits, here and in PEFT. A usual one takes milliseconds for all names.
_MOST_SECONDS = 2
# PEFT takes whatever is not empty for true, "no" among it.
_SWITCHES = ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "inference_mode")
_NAMES = tuple(
    f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
    for layer in (0, 1, 9, 10, 55)
    for name in LINEAR_LAYERS
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the content of a LoRA adapter's `adapter_config.json`; patterns that are null become empty.

    Raises:
        ExportError: it is missing, is no LoRA adapter of PEFT, or holds values that cannot be used; the message lists them.
    """
    path = folder / PEFT_CONFIG_FILE
    config = read_json(path)
    if config is None:
        raise ExportError(f"{folder}: holds no {PEFT_CONFIG_FILE}; give a folder that PEFT wrote")
    if not isinstance(config, dict):
        raise ExportError(f"{path}: must hold an object; found {type(config).__name__}; give a folder that PEFT wrote")
    if "fine_tune_type" in config:
        raise ExportError(f"{path}: was written by mlx-lm, not by PEFT; fuse the adapter there with `mlx_lm.fuse`")
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be used here")
    if faults := list(_list_faults(config)):
        raise ExportError(f"{path}: {'; '.join(faults)}")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = config.get(key) or {}
    return config


def check_language_adapter(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that an adapter belongs to a language model.

    Raises:
        ExportError: it is an adapter of a classifier, a reward model or a model without a head.
    """
    if config.get("task_type") not in _TASKS:
        raise ExportError(
            f"{folder / PEFT_CONFIG_FILE}: task_type is {config['task_type']!r}; only adapters of language models (CAUSAL_LM) can be used here"
        )


def _list_faults(config: Mapping[str, Any]) -> Iterator[str]:
    if not _is_number(config.get("r")) or not isinstance(config["r"], int):
        yield f"r is {config.get('r')!r}; expected a whole number above 0"
    if not _is_number(config.get("lora_alpha")):
        yield f"lora_alpha is {config.get('lora_alpha')!r}; expected a number above 0"
    for key in _SWITCHES:
        if not isinstance(config.get(key), bool | None):
            yield f"{key} is {config[key]!r}; expected true or false"
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        yield f"layers_to_transform is {layers!r}; expected a layer's number, or a list of them"
    if isinstance(config.get("modules_to_save"), str):
        yield f"modules_to_save is {config['modules_to_save']!r}; expected a list of names: PEFT takes each letter for a name"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if not isinstance(patterns, dict | None):
            yield f"{key} is {patterns!r}; expected an object of patterns and numbers"
            continue
        for pattern, value in (patterns or {}).items():
            yield from _list_pattern_faults(key, pattern, value)
    targets = config.get("target_modules")
    for key in ("exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(key) or ()
        if not isinstance(value, str | list | tuple):
            yield f"{key} is {value!r}; expected a list of names, or one pattern"
            continue
        for pattern in [value] if isinstance(value, str) else value:
            yield from _list_regex_faults(key, pattern)
    if isinstance(targets, str):
        yield from _list_regex_faults("target_modules", targets)
    elif targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        yield f"target_modules is {targets!r}; expected a list of names, or one pattern"


def _list_pattern_faults(key: str, pattern: str, value: Any) -> Iterator[str]:
    yield from _list_regex_faults(key, pattern)
    if not _is_number(value) or (key == "rank_pattern" and value != int(value)):
        yield f"{key} gives {pattern!r} the value {value!r}; expected a {'whole ' if key == 'rank_pattern' else ''}number above 0"


def _list_regex_faults(key: str, pattern: Any) -> Iterator[str]:
    if not isinstance(pattern, str):
        yield f"{key} holds {pattern!r}; expected a name or a pattern"
        return
    try:
        with limit_seconds(_MOST_SECONDS):
            compiled = re.compile(pattern)
            # PEFT matches whole names, and for some keys the end of a name.
            ending = re.compile(rf"(.*\.)?({pattern})$")
            for name in _NAMES:
                compiled.fullmatch(name)
                ending.match(name)
    except (re.error, RecursionError, OverflowError) as error:
        yield f"{key} holds {pattern!r}, which is no regular expression ({error})"
    except TimeoutError:
        yield f"{key} holds {pattern!r}, which takes more than {_MOST_SECONDS} seconds to match the names of layers"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
