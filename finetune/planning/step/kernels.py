"""Make a plan, which runs CPU kernels, count what the kernels of a GPU would allocate."""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import bitsandbytes  # noqa: F401 - registers the operations below
import torch

from finetune.compat import do_nothing, identify_storage, load_operations, replace_attribute, run_losses_in_place
from finetune.planning.step.step_parts import list_weights
from finetune.planning.step.tracker import KernelWorkspace, Substitute
from finetune.yulan.native import native_loss as native_loss

_OPERATIONS = load_operations()
_FLOAT_BYTES = 4
# FlashAttention's backward pass pads rows to this many tokens.
_FLASH_ROUNDING = 128
# The multiprocessors of the largest card that plans are made for, the RTX 5090: its whitepaper.
_MOST_PROCESSORS = 170
_SMALLEST_OFFLOADED, _STASHED_TENSORS = 1024, 5


def _measure_flash_backward(arguments: Sequence[Any], output: Any) -> int:
    """Count the bytes of FlashAttention 2's own buffers: float32 query gradients, a sum per row, expanded key gradients.

    Source: mha_bwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp of torch 2.13: dq_accum, softmax_d,
    dk_expanded and dv_expanded.
    """
    query, key = arguments[1], arguments[2]
    batch, heads, tokens, width = query.shape
    padded = -(-tokens // _FLASH_ROUNDING) * _FLASH_ROUNDING
    accumulated = batch * padded * heads * (width + 1) * _FLOAT_BYTES
    expanded = 2 * batch * key.shape[2] * heads * width * key.element_size() if key.shape[1] != heads else 0
    return int(accumulated + expanded)


def _measure_repeatable_backward(arguments: Sequence[Any], output: Any) -> int:
    """Count those buffers where flash_attn adds in the same order each time: query gradients are kept in several parts.

    Source: mha_bwd in csrc/flash_attn/flash_api.cpp of flash_attn 2.8: dq_accum with nsplits.
    """
    batch, heads, tokens, width = arguments[1].shape
    parts = -(-_MOST_PROCESSORS // (batch * heads))
    padded = -(-tokens // _FLASH_ROUNDING) * _FLASH_ROUNDING
    more = (parts - 1) * batch * padded * heads * width * _FLOAT_BYTES
    return int(_measure_flash_backward(arguments, output) + more)


def _measure_dequantized(arguments: Sequence[Any], output: Any) -> int:
    """Count the bytes of one dequantized 4-bit layer: long inputs are multiplied with such a copy.

    Source: _dequant_linear_fallback in bitsandbytes/backends/cuda/ops.py of 0.50.
    """
    activations, shape, blocksize = arguments[0], arguments[2], arguments[4]
    elements = shape[0] * shape[1]
    # The weight, and its float32 scales twice: dequantized from 8 bits, and with the offset added.
    return int(elements * activations.element_size() + 2 * (elements // blocksize) * _FLOAT_BYTES)


GPU_WORKSPACES: Mapping[Any, KernelWorkspace] = {
    _OPERATIONS.attention_backward: _measure_flash_backward,
    torch.ops.bitsandbytes.gemm_4bit.default: _measure_dequantized,
}

REPEATABLE_WORKSPACES: Mapping[Any, KernelWorkspace] = {
    **GPU_WORKSPACES,
    _OPERATIONS.attention_backward: _measure_repeatable_backward,
}


def answer_item_calls(answer: bool) -> dict[Any, Substitute]:
    """Return the substitute for `Tensor.item()` on tensors without content: `answer` for a bool tensor, else 1."""

    def read(arguments: Sequence[Any]) -> bool | int:
        return answer if arguments[0].dtype == torch.bool else 1

    return {_OPERATIONS.read_number: read}


def _take_all(arguments: Sequence[Any]) -> Any:
    """Select by a mask as if it were true everywhere, which is the most that a batch can train."""
    tensor, indices = arguments[0], arguments[1]
    if len(indices) != 1 or indices[0].dtype != torch.bool:
        return torch.ops.aten.index.Tensor(*arguments)
    return tensor.new_empty(indices[0].numel(), *tensor.shape[indices[0].ndim :])


def _find_all(arguments: Sequence[Any]) -> Any:
    """Return the indices of a mask as if it were true everywhere."""
    mask = arguments[0]
    return mask.new_empty((mask.numel(), mask.ndim), dtype=torch.int64)


def _view(arguments: Sequence[Any]) -> Any:
    """Return an ordinary view, whose output torch caches for tensors without content; `_unsafe_view` shares the storage as well."""
    return torch.ops.aten.view.default(*arguments)


CACHED_VIEW: Mapping[Any, Substitute] = {_OPERATIONS.unsafe_view: _view}
MASKED_SELECTION: Mapping[Any, Substitute] = {
    torch.ops.aten.index.Tensor: _take_all,
    torch.ops.aten.nonzero.default: _find_all,
}


class OffloadedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Imitate what TRL's activation offloading does to memory: saved tensors leave the device, except for the last few.

    Source: OffloadActivations in trl/models/activation_offloading.py of 1.16.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._resident = {identify_storage(tensor.untyped_storage()) for _, tensor in list_weights(model)}
        self._leaving: deque[torch.Tensor] = deque(maxlen=_STASHED_TENSORS)
        self._away = self.most_away = 0  # bytes in main memory, now and at most
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Size, torch.dtype]:
        small = tensor.numel() * tensor.element_size() < _SMALLEST_OFFLOADED
        if small or identify_storage(tensor.untyped_storage()) in self._resident:
            return tensor
        self._leaving.append(tensor)
        self._away += tensor.numel() * tensor.element_size()
        self.most_away = max(self.most_away, self._away)
        return tensor.shape, tensor.dtype

    def _unpack(self, packed: torch.Tensor | tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._leaving.clear()
        self._away -= packed[0].numel() * packed[1].itemsize
        return torch.empty(packed[0], dtype=packed[1])


@contextlib.contextmanager
def allocate_as_gpu() -> Iterator[None]:
    """Let the losses allocate as on a GPU: kernels work in place there, and torch's CPU operations would copy."""
    with run_losses_in_place(), replace_attribute(native_loss, "add_product", do_nothing):
        yield
