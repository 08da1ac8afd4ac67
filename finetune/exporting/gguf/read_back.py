"""Read a GGUF file back, and compare every tensor with its source; no part of llama.cpp is needed for that."""

from __future__ import annotations

from pathlib import Path

import numpy
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from finetune.errors import ExportError
from finetune.exporting.gguf.gguf_file import PlannedTensor, list_file_pieces, plan_tensors, read_rows
from finetune.exporting.gguf.llama_folder import LlamaFolder
from finetune.exporting.gguf.tensor_types import TENSOR_TYPES, Floats, TensorType
from finetune.yulan.shards import Piece, run_pieces


def compare_file(file: Path, source: LlamaFolder, chosen: TensorType) -> int:
    """Compare every value of a file with its source, within half a step of its type; return the number of tensors.

    Raises:
        ExportError: a tensor differs, or the file is not what was planned.
    """
    planned = {tensor.name: tensor for tensor in plan_tensors(source, chosen)}
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    if stored.keys() != planned.keys():
        raise ExportError(f"{file}: holds other tensors than were written; nothing was left; check the disk")

    def find_excess(piece: Piece) -> tuple[str, float]:
        tensor, found = planned[piece.name], stored[piece.name]
        expected = read_rows(source, tensor, piece)
        rows = _read_stored(file, found, tensor, piece)
        limit = _find_limit(expected, tensor)
        return piece.name, float((numpy.abs(rows - expected) - limit).max())

    wrong: dict[str, float] = {}
    for name, excess in run_pieces(list_file_pieces(list(planned.values())), find_excess):
        if not excess <= 0:
            wrong[name] = max(excess, wrong.get(name, 0.0))
    if wrong:
        name, excess = next(iter(wrong.items()))
        raise ExportError(
            f"{file}: {len(wrong)} tensors differ from {source.folder} by more than half a step of {chosen.name} (first: {name}, "
            f"{excess:.2g} too far); nothing was left; check the disk, and write it again"
        )
    return len(planned)


def _read_stored(file: Path, found: ReaderTensor, tensor: PlannedTensor, piece: Piece) -> NDArray[numpy.floating]:
    """Return rows of the file in float32, in the order of the folder."""
    if tuple(reversed(found.shape.tolist())) != tensor.shape or found.tensor_type != tensor.kind:
        raise ExportError(f"{file}: {tensor.name} has another shape or type than was written; check the disk")
    is_matrix = len(tensor.shape) == 2
    start, count = (piece.start, piece.stop - piece.start) if is_matrix else (0, 1)
    # Read through a file: the pages of the reader's map would count as memory of this process.
    raw = numpy.fromfile(
        file, numpy.uint8, count * tensor.row_bytes, offset=int(found.data_offset) + start * tensor.row_bytes
    )
    rows: Floats = dequantize(raw.reshape(count, tensor.row_bytes), tensor.kind)
    if not tensor.head_dim:
        return rows if is_matrix else rows[0]
    # The inverse of what was written: pairs of neighbours become two halves again.
    shape = rows.shape if is_matrix else (tensor.shape[0],)
    pairs = rows.reshape(-1, tensor.head_dim // 2, 2, *shape[1:])
    return numpy.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(shape)


def _find_limit(expected: Floats, tensor: PlannedTensor) -> Floats:
    if len(tensor.shape) == 1:
        return numpy.zeros_like(expected)
    width = 32 if tensor.shape[1] % 32 == 0 else tensor.shape[1]
    limit = TENSOR_TYPES[tensor.kind.name.lower()].limit
    return limit(expected.reshape(-1, width)).reshape(expected.shape)
