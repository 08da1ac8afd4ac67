"""Multiply with 16-bit copies of a LoRA adapter's matrices, made once a step, in place of rounding them wherever they are used.

Autocast rounds each float32 matrix before every product, again when gradient checkpointing repeats a layer, and widens each gradient:
six small kernels for every linear layer and batch. A copy that is made for all matrices together gives the same bits: the products
read the same 16-bit numbers, and the gradients are widened before they are summed. The optimizer, checkpoints and results see only
the float32 matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer


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
    _step: Callable[..., Any] | None = None

    def switch_on(self, trainer: Trainer) -> None:
        """Let training read copies, and bring their gradients to the matrices after every batch."""
        for module in self.matrices:
            # A plain attribute, no parameter of the module: nobody saves or steps it.
            module.narrow = module.weight.detach().to(self.dtype).requires_grad_()
            module.forward = MethodType(_multiply, module)
        self._step = step = trainer.training_step

        def step_with_copies(*arguments: Any, **options: Any) -> Any:
            loss = step(*arguments, **options)
            self.bring_gradients()
            return loss

        trainer.training_step = step_with_copies

    def switch_off(self, trainer: Trainer) -> None:
        """Let training read the matrices again."""
        if self._step is not None:
            trainer.training_step, self._step = self._step, None
            for module in self.matrices:
                del module.forward, module.narrow

    def refresh(self) -> None:
        """Make the copies anew from what the optimizer has changed."""
        if self._step is not None:
            with torch.no_grad():
                torch._foreach_copy_(
                    [module.narrow for module in self.matrices], [module.weight for module in self.matrices]
                )

    def bring_gradients(self) -> None:
        """Widen the gradients of a batch to float32, and add them to those of the batches before."""
        used = [module for module in self.matrices if self._step is not None and module.narrow.grad is not None]
        if not used:
            return
        wide = [torch.empty_like(module.weight) for module in used]
        torch._foreach_copy_(wide, [module.narrow.grad for module in used])
        sums, added = [], []
        for module, gradient in zip(used, wide, strict=True):
            module.narrow.grad = None
            if module.weight.grad is None:
                module.weight.grad = gradient
            else:
                sums.append(module.weight.grad)
                added.append(gradient)
        if sums:
            torch._foreach_add_(sums, added)
