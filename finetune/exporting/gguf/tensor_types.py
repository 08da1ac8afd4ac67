"""The types in which a GGUF file holds weights, and how far a stored value may lie from its source.

Source: ggml-quants.c of llama.cpp, `quantize_row_*_ref`; the `gguf` package computes the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy
from gguf import GGMLQuantizationType, LlamaFileType, quantize
from numpy.typing import NDArray

Floats = NDArray[numpy.float32]


@dataclass(frozen=True)
class TensorType:
    """One type; `file_type` is what the file's header calls a file of it, and `limit` bounds the error of each value.

    `limit` takes source values as (blocks, values of a block) and returns the largest errors, of the same shape.
    """

    name: str
    kind: GGMLQuantizationType
    file_type: LlamaFileType
    limit: Callable[[Floats], Floats]


def _round_half(values: Floats) -> Floats:
    """Return half the distance of two neighbouring 16-bit floats at these values."""
    return numpy.maximum(numpy.abs(values) * numpy.float32(2.0**-11), numpy.float32(2.0**-25))


def _limit_rounding(bits: int) -> Callable[[Floats], Floats]:
    # The second term is half the distance of two subnormal numbers of float16; bfloat16's are far smaller.
    return lambda blocks: numpy.abs(blocks) * numpy.float32(2.0**-bits) + numpy.float32(2.0**-25 if bits == 11 else 0)


def _limit_symmetric(steps: int, top: float) -> Callable[[Floats], Floats]:
    """Half a step, where the value of largest size is `steps` steps away from 0, and the other side ends after `top` steps."""

    def limit(blocks: Floats) -> Floats:
        largest: Floats = numpy.take_along_axis(blocks, numpy.abs(blocks).argmax(-1, keepdims=True), -1)
        step = (numpy.abs(largest) / steps).astype(numpy.float32)
        # The side opposite to the largest value has one step less, so a value at its very end is cut off.
        beyond = numpy.where(blocks * largest < 0, numpy.abs(blocks) - step * top, 0)
        limits: Floats = (
            numpy.maximum(step / 2, beyond) + numpy.float32(steps) * _round_half(step) + numpy.abs(largest) * 1e-6
        )
        return limits

    return limit


def _limit_between(steps: int) -> Callable[[Floats], Floats]:
    """Half a step, where the smallest and the largest value of a block are `steps` steps apart."""

    def limit(blocks: Floats) -> Floats:
        lowest, highest = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        step = (highest - lowest) / numpy.float32(steps)
        slack = (
            numpy.float32(steps) * _round_half(step)
            + _round_half(lowest)
            + numpy.abs(blocks).max(-1, keepdims=True) * 1e-6
        )
        return numpy.broadcast_to(step / 2 + slack, blocks.shape)

    return limit


# The largest number below one half. Adding one half itself would round the number just below it up.
_BELOW_HALF = numpy.float32(0.49999997)


def quantize_rows(rows: Floats, kind: GGMLQuantizationType) -> NDArray[numpy.generic]:
    """Return rows in a type, with the same bits as `gguf.quantize`.

    Q8_0 is written out here with fewer passes and copies: `benchmarks/gguf_files.py` takes half the time with it.
    """
    if kind != GGMLQuantizationType.Q8_0:
        found: NDArray[numpy.generic] = quantize(rows, kind)
        return found
    blocks = rows.reshape(-1, 32)
    values = numpy.abs(blocks)
    scales = values.max(axis=1, keepdims=True) / numpy.float32(127)
    inverse = numpy.divide(numpy.float32(1), scales, where=scales > 0, out=numpy.zeros_like(scales))
    numpy.multiply(blocks, inverse, out=values)
    values += numpy.copysign(_BELOW_HALF, values)  # storing cuts off, so this rounds halves away from zero
    out = numpy.empty(len(blocks), [("scale", "<f2"), ("values", "i1", 32)])
    out["scale"], out["values"] = scales[:, 0], values
    return out.view(numpy.uint8).reshape(*rows.shape[:-1], -1)


_KINDS, _FILES = GGMLQuantizationType, LlamaFileType
TENSOR_TYPES: Mapping[str, TensorType] = {
    row.name: row
    for row in (
        TensorType("f32", _KINDS.F32, _FILES.ALL_F32, numpy.zeros_like),
        TensorType("f16", _KINDS.F16, _FILES.MOSTLY_F16, _limit_rounding(11)),
        TensorType("bf16", _KINDS.BF16, _FILES.MOSTLY_BF16, _limit_rounding(8)),
        TensorType("q8_0", _KINDS.Q8_0, _FILES.MOSTLY_Q8_0, _limit_symmetric(127, 127)),
        TensorType("q5_0", _KINDS.Q5_0, _FILES.MOSTLY_Q5_0, _limit_symmetric(16, 15)),
        TensorType("q5_1", _KINDS.Q5_1, _FILES.MOSTLY_Q5_1, _limit_between(31)),
        TensorType("q4_0", _KINDS.Q4_0, _FILES.MOSTLY_Q4_0, _limit_symmetric(8, 7)),
        TensorType("q4_1", _KINDS.Q4_1, _FILES.MOSTLY_Q4_1, _limit_between(15)),
    )
}
