"""Write a Llama folder as one GGUF file, a few rows at a time.

Source of the format: github.com/ggml-org/ggml, docs/gguf.md; of the names and the order of rows: llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from finetune.errors import ExportError
from finetune.exporting.gguf.llama_folder import LlamaFolder
from finetune.exporting.gguf.metadata import add_metadata
from finetune.exporting.gguf.tensor_types import Floats, TensorType, quantize_rows
from finetune.yulan.shards import Piece, run_pieces

# A group of rows and what quantizing makes of it fit a processor's cache.
_PIECE_ELEMENTS = 1 << 18
_FLOAT16_MOST = 65504.0


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a GGUF file: its name there, the name in the folder, how it is stored, and where its bytes begin.

    `head_dim` is 0 where the rows keep their order, else the rows of each head.
    """

    name: str
    stored_name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    head_dim: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row; a vector is one row."""
        block, size = map(int, GGML_QUANT_SIZES[self.kind])
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.rows * self.row_bytes


def plan_tensors(source: LlamaFolder, chosen: TensorType) -> list[PlannedTensor]:
    """List the tensors of the file: matrices in the chosen type, norms and biases in float32.

    Raises:
        ExportError: the rows of a matrix cannot be divided into blocks of the type.
    """
    planned = []
    block = GGML_QUANT_SIZES[chosen.kind][0]
    for stored_name, name in source.names.items():
        shape = source.tensors.shape(stored_name)
        if len(shape) == 2 and shape[1] % block:
            raise ExportError(
                f"{source.folder}: {stored_name} has rows of {shape[1]} values, and {chosen.name} stores blocks of {block}; use f16"
            )
        kind = chosen.kind if len(shape) == 2 else GGMLQuantizationType.F32
        is_permuted = ".self_attn.q_proj." in stored_name or ".self_attn.k_proj." in stored_name
        planned.append(PlannedTensor(name, stored_name, shape, kind, source.head_dim if is_permuted else 0))
    return planned


def permute_heads(rows: NDArray[numpy.generic], head_dim: int) -> NDArray[numpy.generic]:
    """Put the two halves of each head between one another, as llama.cpp's RoPE takes them.

    transformers turns value i with value i + d/2, llama.cpp value 2i with value 2i + 1. `rows` holds whole heads, (heads * d, …).
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def list_file_pieces(planned: Sequence[PlannedTensor]) -> list[Piece]:
    """Cut the tensors into pieces of whole rows, and of whole heads where heads are permuted; a vector is one piece."""
    pieces = []
    for tensor in planned:
        if len(tensor.shape) == 1:
            pieces.append(Piece(tensor.name, 0, tensor.shape[0]))
            continue
        unit = tensor.head_dim or 1
        step = max(1, _PIECE_ELEMENTS // tensor.shape[1] // unit) * unit
        pieces += [Piece(tensor.name, start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step)]
    return pieces


def read_rows(source: LlamaFolder, tensor: PlannedTensor, piece: Piece) -> Floats:
    """Return rows of the folder in float32, in the folder's order.

    Raises:
        ExportError: they hold NaN or infinite values, or values that float16 cannot hold where the type needs that.
    """
    rows = source.tensors.read_rows(tensor.stored_name, piece.start, piece.stop).to(torch.float32).numpy()
    found: Floats = rows
    largest = max(float(found.max()), -float(found.min()))
    if not math.isfinite(largest):
        raise ExportError(f"{source.folder}: {tensor.stored_name} holds NaN or infinite values; nothing was written")
    if largest > _FLOAT16_MOST and tensor.kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        raise ExportError(
            f"{source.folder}: {tensor.stored_name} holds {largest:.3g}, which 16-bit floats of this type cannot hold; use bf16 or f32"
        )
    return found


def write_gguf(
    file: Path, source: LlamaFolder, chosen: TensorType, count_bytes: Callable[[int], object] = lambda size: None
) -> int:
    """Write the file; return its size in bytes. `count_bytes` is told of every piece that was written.

    Raises:
        ExportError: see `plan_tensors` and `read_rows`.
    """
    planned = plan_tensors(source, chosen)
    positions = _write_header(file, source, planned, chosen)
    by_name = {tensor.name: tensor for tensor in planned}
    lock = threading.Lock()
    with file.open("r+b", buffering=0) as stream:

        def write(piece: Piece) -> None:
            tensor = by_name[piece.name]
            rows = read_rows(source, tensor, piece)
            if tensor.head_dim:
                rows = permute_heads(rows, tensor.head_dim).astype(numpy.float32, copy=False)
            view = numpy.ascontiguousarray(quantize_rows(rows, tensor.kind)).view(numpy.uint8).reshape(-1).data
            start = positions[tensor.name] + (piece.start * tensor.row_bytes if len(tensor.shape) == 2 else 0)
            with lock:
                stream.seek(start)
                size = len(view)
                while view:
                    view = view[stream.write(view) :]
                count_bytes(size)

        for _ in run_pieces(list_file_pieces(planned), write):
            pass
        last = planned[-1]
        stream.truncate(GGUFWriter.ggml_pad(positions[last.name] + last.bytes, _ALIGNMENT))
    return file.stat().st_size


_ALIGNMENT = 32  # the format's default, in bytes


def _write_header(
    file: Path, source: LlamaFolder, planned: Sequence[PlannedTensor], chosen: TensorType
) -> dict[str, int]:
    """Write everything before the weights; return where the bytes of each tensor begin."""
    writer = GGUFWriter(file, "llama")
    add_metadata(writer, source, chosen)
    for tensor in planned:
        shape = (*tensor.shape[:-1], tensor.row_bytes)  # in bytes, from which the writer finds the values
        writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), tensor.bytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    position = GGUFWriter.ggml_pad(file.stat().st_size, _ALIGNMENT)
    positions = {}
    for tensor in planned:
        positions[tensor.name] = position
        position += GGUFWriter.ggml_pad(tensor.bytes, _ALIGNMENT)
    return positions
