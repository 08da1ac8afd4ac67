"""Compute the attention of training passes with the package flash_attn, where it is installed.

transformers gives its flash kernels no square mask: padding is cut out, and documents of a packed row are told apart by where they
begin. The kernel is on for the forward and the backward pass of a batch, because gradient checkpointing computes layers again in
the backward pass. Evaluation and answers keep the plain kernel, so that their figures are those of `finetune evaluate`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from finetune.compat import name_attention
from finetune.files.launcher import add_variables
from finetune.training.pretraining.packed_documents import keep_documents_apart
from finetune.training.speed.switch import Switch

KERNEL = "flash_attention_2"
# transformers reads it at each call of a flash kernel. Without it the backward pass adds in another order each time, on rows of more
# than one block of keys, so that a resumed run would be another run.
# Source: _process_flash_attention_kwargs in transformers/modeling_flash_attention_utils.py of 5.23.
_SAME_ORDER = {"FLASH_ATTENTION_DETERMINISTIC": "1"}


class FlashAttention(Switch):
    """The attention of a model; while it is on, batches of training use the kernel."""

    def __init__(self, model: Any, dtype: torch.dtype, attention: str) -> None:
        """`dtype` is the type that is computed in; `attention` is what the recipe says of the kernel."""
        super().__init__()
        self._model, self._dtype, self._attention = model, dtype, attention

    def find_obstacle(self) -> str | None:
        """Return why this run computes with another kernel, or None."""
        if self._attention != "auto":
            return f"model.attention asks for {self._attention}"
        if self._dtype == torch.float32:
            return "the run computes in float32, and the kernel knows 16 bits only"
        return None

    def change(self, undo: contextlib.ExitStack) -> None:
        """Let batches use the kernel.

        Raises:
            ValueError: the model's class does not leave the choice of the kernel to others.
        """
        before = name_attention(self._model.config)
        try:
            self._model.set_attn_implementation(KERNEL)  # transformers checks here what the kernel needs
            chosen = name_attention(self._model.config)
        finally:
            name_attention(self._model.config, before)
        if chosen != KERNEL:
            raise ValueError(f"{type(self._model).__name__} computes with {chosen}, whatever kernel it is told")
        undo.callback(keep_documents_apart(self._model))

    @contextlib.contextmanager
    def around_batch(self) -> Iterator[None]:
        """Let the model use the kernel inside the context."""
        config = self._model.config
        before = name_attention(config)
        try:
            name_attention(config, KERNEL if self.is_on else None)
            yield
        finally:
            name_attention(config, before)


def keep_order_of_sums() -> contextlib.AbstractContextManager[None]:
    """Return a context in which FlashAttention adds in the same order each time, unless the variable of transformers is set."""
    return add_variables(_SAME_ORDER)


def find_missing_flash(device: torch.device) -> str | None:
    """Return what the kernel lacks on this machine, or None."""
    if device.type != "cuda":
        return "FlashAttention needs an NVIDIA GPU"
    return None if is_flash_attn_2_available() else "the package flash_attn is not installed (pip install flash-attn)"
