"""Multiply in bfloat16 on a processor that has instructions for it, where `model.dtype: auto` computes in float32.

torch's autocast rounds the factors of matrix products to bfloat16. Weights, their updates, norms and the loss stay in float32, and so do
evaluation and answers.
"""

import contextlib
from typing import Any

import torch
from transformers import Trainer

from finetune.compat import replace_attribute
from finetune.training.speed.switch import Switch


class BFloat16Products(Switch):
    """The products of the passes of a trainer; while it is on, those of training passes have factors in bfloat16."""

    def __init__(self, trainer: Trainer, computed: torch.dtype, asked: str) -> None:
        """`computed` is the type that the trainer computes in; `asked` is what the recipe says of it."""
        super().__init__()
        self._trainer: Any = trainer
        self._computed, self._asked = computed, asked

    def find_obstacle(self) -> str | None:
        """Return why this run computes in another type, or None."""
        if self._computed != torch.float32:
            return "the run computes in 16 bits already"
        return None if self._asked == "auto" else f"model.dtype asks for {self._asked}"

    def change(self, undo: contextlib.ExitStack) -> None:
        """Let training passes run under autocast; the backward pass follows the types of the forward pass by itself."""
        trainer, plain = self._trainer, self._trainer.compute_loss_context_manager

        def enter() -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            stack.enter_context(plain())
            if trainer.model.training:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            return stack

        undo.enter_context(replace_attribute(trainer, "compute_loss_context_manager", enter))
