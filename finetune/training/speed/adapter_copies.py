"""Multiply with 16-bit copies of a LoRA adapter's matrices, made once a step, in place of rounding them wherever they are used.

Autocast rounds each float32 matrix before every product, again when gradient checkpointing repeats a layer, and widens each gradient:
six small kernels for every linear layer and batch, each followed through autograd. A copy that is made once a step gives the same bits:
the products read the same 16-bit numbers, and the gradients are widened before they are summed. The optimizer, checkpoints and results
see only the float32 matrices.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune.compat import copy_each, replace_attribute
from finetune.training.speed.switch import Switch


def list_lora_matrices(model: nn.Module) -> list[nn.Linear]:
    """Return the modules A and B of all trained plain LoRA layers; those of DoRA also enter norms in float32, and are left out."""
    found: list[nn.Linear] = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            for matrices in (layer.lora_A, layer.lora_B):
                found += [module for module in matrices.values() if _is_trained(module)]
    return found


def _is_trained(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.requires_grad and module.weight.dtype == torch.float32


def _multiply(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(inputs, module.narrow if module.training else module.weight, module.bias)


class AdapterCopies(Switch):
    """Copies of an adapter's matrices in the type of autocast; evaluation and generation read the matrices themselves."""

    def __init__(self, matrices: Sequence[Any], dtype: torch.dtype) -> None:
        super().__init__()
        self._matrices, self._dtype = matrices, dtype

    def find_obstacle(self) -> str | None:
        """Return why there is nothing to copy, or None."""
        if self._dtype == torch.float32:
            return "the run computes in float32"
        return None if self._matrices else "no float32 matrices of a plain LoRA adapter are trained"

    def change(self, undo: contextlib.ExitStack) -> None:
        """Let training read copies."""
        for module in self._matrices:
            # A plain attribute, no parameter of the module: nobody saves or steps it.
            module.narrow = module.weight.detach().to(self._dtype).requires_grad_()
            undo.callback(delattr, module, "narrow")
            undo.enter_context(replace_attribute(module, "forward", MethodType(_multiply, module)))

    @contextlib.contextmanager
    def around_batch(self) -> Iterator[None]:
        """Widen the gradients of a batch to float32, and add them to those of the batches before."""
        yield
        new, narrow = list[torch.Tensor](), list[torch.Tensor]()
        for module in self._matrices if self.is_on else ():
            gradient, module.narrow.grad = module.narrow.grad, None
            if gradient is None:
                continue
            if module.weight.grad is None:
                module.weight.grad = torch.empty_like(module.weight)
                new.append(module.weight.grad)
                narrow.append(gradient)
            else:
                module.weight.grad += gradient
        if new:
            copy_each(new, narrow)

    def follow_optimizer(self) -> None:
        """Make the copies anew from what the optimizer has changed."""
        if self.is_on:
            with torch.no_grad():
                copy_each([module.narrow for module in self._matrices], [module.weight for module in self._matrices])
