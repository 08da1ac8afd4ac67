"""What GPU kernels allocate, where the CPU's, which a plan runs through, allocate more or less."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401 - registers the operations below
import torch
from transformers import masking_utils
from trl.kernels import chunked_logprob

from finetune.plan.tracker import KernelWorkspace

_FLOAT_BYTES = 4
# FlashAttention's backward pass pads rows to this many tokens.
_FLASH_ROUNDING = 128


def _measure_flash_backward(arguments: Sequence[Any], output: Any) -> int:
    """Return the bytes of FlashAttention 2's own buffers: float32 query gradients, a sum per row, expanded key gradients.

    Source: mha_bwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp of torch 2.13: dq_accum, softmax_d,
    dk_expanded and dv_expanded.
    """
    query, key = arguments[1], arguments[2]
    batch, heads, tokens, width = query.shape
    padded = -(-tokens // _FLASH_ROUNDING) * _FLASH_ROUNDING
    accumulated = batch * padded * heads * (width + 1) * _FLOAT_BYTES
    expanded = 2 * batch * key.shape[2] * heads * width * key.element_size() if key.shape[1] != heads else 0
    return accumulated + expanded


def _measure_dequantized(arguments: Sequence[Any], output: Any) -> int:
    """Return the bytes of one 4-bit layer in full: long inputs are multiplied with a dequantized copy.

    Source: _dequant_linear_fallback in bitsandbytes/backends/cuda/ops.py of 0.50.
    """
    activations, shape, blocksize = arguments[0], arguments[2], arguments[4]
    elements = shape[0] * shape[1]
    # The weight, and its scales twice: as they come out of their 8 bits, and with their offset.
    return int(elements * activations.element_size() + 2 * (elements // blocksize) * _FLOAT_BYTES)


GPU_WORKSPACES: Mapping[Any, KernelWorkspace] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _measure_flash_backward,
    torch.ops.bitsandbytes.gemm_4bit.default: _measure_dequantized,
}


def _fold_nothing(*arguments: Any, **options: Any) -> None:
    """Stand in for a Triton kernel that works in place."""


@contextlib.contextmanager
def allocate_as_gpu() -> Iterator[None]:
    """Run TRL's loss as on a GPU: its Triton kernels read and overwrite a tile of logits where torch would make copies."""
    with (
        mock.patch.object(chunked_logprob, "_forward_tile", _fold_nothing),
        mock.patch.object(chunked_logprob, "_backward_tile", _fold_nothing),
        mock.patch.object(chunked_logprob, "_addmm_fp32", _fold_nothing),
    ):
        yield


@contextlib.contextmanager
def build_masks_as_in_run() -> Iterator[None]:
    """Let transformers decide about masks as in a run; for tensors without content it would always build them."""
    with mock.patch.object(masking_utils, "is_tracing", _answer_no):
        yield


def _answer_no(tensor: object = None) -> bool:
    return False
