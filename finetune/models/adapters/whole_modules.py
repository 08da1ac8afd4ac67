"""Train whole modules beside LoRA: PEFT's `modules_to_save`, as float32 copies."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from finetune.recipe.sections import WHOLE_MODULES


def name_whole_modules(names: Sequence[str]) -> list[str] | None:
    """Return PEFT's setting `modules_to_save` for a recipe's; None for no modules."""
    return [WHOLE_MODULES[name] for name in names] or None


def widen_copies(model: nn.Module) -> bool:
    """Hold the trained copies of whole modules in float32, and let them give the dtype of the module that they replace.

    Return whether there are any that had another dtype.

    PEFT copies a bfloat16 module as it is, and most optimizer steps would be smaller than half the distance between two
    neighbouring bfloat16 numbers. Without the dtype of the base, every activation after an embedding would take twice the memory.
    """
    narrow = [
        (copy, dtype)
        for copy, dtype in _list_copies(model)
        if any(parameter.dtype != torch.float32 for parameter in copy.parameters())
    ]
    for copy, dtype in narrow:
        copy.to(torch.float32)
        copy.register_forward_pre_hook(_widen_inputs)
        copy.register_forward_hook(_Narrow(dtype))
    return bool(narrow)


def _list_copies(model: nn.Module) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Yield each copy, and the dtype of the module that it replaces."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtype = next(module.original_module.parameters()).dtype
            for copy in module.modules_to_save.values():
                yield copy, dtype


def _widen_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a head without autocast inputs of its own dtype; norms widen theirs, and autocast casts by itself."""
    first = inputs[0]
    if not isinstance(module, nn.Linear) or torch.is_autocast_enabled(first.device.type):
        return None
    return (first.to(module.weight.dtype), *inputs[1:])


class _Narrow:
    """Casts the output of a copy to the dtype of the base."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.to(self._dtype)
