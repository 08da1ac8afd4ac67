"""Multiply with 16-bit copies of a LoRA adapter's matrices, made once a step, in place of rounding them wherever they are used.

Autocast rounds each float32 matrix before every product, again when gradient checkpointing repeats a layer, and widens each gradient:
six small kernels for every linear layer and batch, each followed through autograd. A copy that is made once a step gives the same bits:
the products read the same 16-bit numbers, and the gradients are widened before they are summed. The optimizer, checkpoints and results
see only the float32 matrices.
"""

import contextlib
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from finetune.compat import replace_attribute


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


@dataclass
class AdapterCopies:
    """Copies of an adapter's matrices in the type of autocast; evaluation and generation read the matrices themselves."""

    matrices: list[Any]
    dtype: torch.dtype
    _on: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _are_on: bool = False

    def switch_on(self, trainer: Trainer) -> None:
        """Let training read copies, and bring their gradients to the matrices after every batch."""
        step = trainer.training_step

        def step_with_copies(*arguments: Any, **options: Any) -> Any:
            loss = step(*arguments, **options)
            self.bring_gradients()
            return loss

        self._on.enter_context(replace_attribute(trainer, "training_step", step_with_copies))
        for module in self.matrices:
            # A plain attribute, no parameter of the module: nobody saves or steps it.
            module.narrow = module.weight.detach().to(self.dtype).requires_grad_()
            self._on.enter_context(replace_attribute(module, "forward", MethodType(_multiply, module)))
        self._are_on = True

    def switch_off(self) -> None:
        """Let training read the matrices again."""
        self._on.close()
        for module in self.matrices if self._are_on else ():
            del module.narrow
        self._are_on = False

    def refresh(self) -> None:
        """Make the copies anew from what the optimizer has changed."""
        with torch.no_grad():
            for module in self.matrices if self._are_on else ():
                module.narrow.copy_(module.weight)

    def bring_gradients(self) -> None:
        """Widen the gradients of a batch to float32, and add them to those of the batches before."""
        for module in self.matrices if self._are_on else ():
            gradient, module.narrow.grad = module.narrow.grad, None
            if gradient is None:
                continue
            if module.weight.grad is None:
                module.weight.grad = gradient.float()
            else:
                module.weight.grad += gradient
