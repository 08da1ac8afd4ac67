"""Say which tensors an adapter must hold by its own configuration, by the rules with which PEFT chooses layers.

Source: PEFT 0.21, `check_target_module_exists` and `ModulesToSaveWrapper`; a test compares the choice with PEFT's own.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from finetune.recipe.sections import LINEAR_LAYERS
from finetune.yulan.llama_files import EMBEDDING, HEAD

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def list_lora_modules(config: Mapping[str, Any], matrices: Collection[str]) -> set[str]:
    """Return those of a model's matrices, by the names of their tensors, that carry LoRA by an adapter's configuration."""
    parameters = tuple(config.get("target_parameters") or ())
    return {
        name
        for name in matrices
        if _is_target(config, name.removesuffix(".weight")) or (parameters and _ends_in(name, parameters))
    }


def list_replaced(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Return the tensors that an adapter replaces whole: modules_to_save, and biases."""
    whole = tuple(config.get("modules_to_save") or ())
    replaced = (
        {name for name in names if any(module.endswith(whole) for module in _list_parents(name))} if whole else set()
    )
    bias = config.get("bias", "none")
    if bias != "none":
        lora = {name.removesuffix(".weight") for name in list_lora_modules(config, names)}
        replaced |= {
            name for name in names if name.endswith(".bias") and (bias == "all" or name.removesuffix(".bias") in lora)
        }
    return replaced


def find_trained_tokens(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """Return the tokens whose rows of a table the adapter replaces, in the order of the stored rows."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((tokens for key, tokens in indices.items() if module.split(".")[-1] == key.split(".")[-1]), ())
    return tuple(indices or ())


def list_token_tables(config: Mapping[str, Any]) -> set[str]:
    """Return the tables whose rows an adapter replaces; a list of tokens means the embedding."""
    indices = config.get("trainable_token_indices")
    if not isinstance(indices, Mapping):
        return {EMBEDDING} if indices else set()
    return {HEAD if key.split(".")[-1] == "lm_head" else EMBEDDING for key, tokens in indices.items() if tokens}


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded and re.fullmatch(excluded, module):
        return False
    if isinstance(excluded, list) and _ends_in(module, tuple(excluded)):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if targets == "all-linear":
        targets = list(LINEAR_LAYERS)
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if not targets or not _ends_in(module, tuple(targets)):
        return False
    return module in targets or _is_chosen_layer(config, module)


def _is_chosen_layer(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns] or [_LAYER.match(module)]
    match = next((match for match in found if match is not None), None)
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])


def _ends_in(name: str, ends: tuple[str, ...]) -> bool:
    return name in ends or name.endswith(tuple(f".{end}" for end in ends))


def _list_parents(name: str) -> Iterator[str]:
    """Yield the modules that hold a tensor, the innermost first: PEFT compares the ends of their names, also within a word."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
