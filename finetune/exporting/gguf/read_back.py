"""Read a GGUF file back, and compare every tensor with its source; no part of llama.cpp is needed for that."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy
from gguf import GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, dequantize
from numpy.typing import NDArray

from finetune.errors import ExportError, describe_count
from finetune.exporting.gguf.gguf_file import PlannedTensor, list_file_pieces, plan_tensors, read_rows
from finetune.exporting.gguf.llama_folder import LlamaFolder
from finetune.exporting.gguf.tensor_types import TENSOR_TYPES, Floats, TensorType
from finetune.yulan.shards import Piece, run_pieces


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a GGUF file describes it; `start` is where its bytes begin in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int


_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the metadata and the tensors of a GGUF file, without their values.

    The package's own reader keeps two views of the file for each of 99,000 tokens, which takes 250 MB.

    Raises:
        ExportError: it is not a GGUF file, or it ends too early.
    """
    try:
        with file.open("rb") as stream:
            magic, _, count, keys = struct.unpack("<IIQQ", stream.read(24))
            if magic != GGUF_MAGIC:
                raise ExportError(f"{file.name}: is not a GGUF file")
            metadata = {_read_text(stream): _read_value(stream) for _ in range(keys)}
            tensors = dict(_read_tensor(stream) for _ in range(count))
            begin = -(-stream.tell() // 32) * 32
    except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ExportError(f"{file.name}: its header is damaged ({error})") from error
    return metadata, {
        name: StoredTensor(found.shape, found.kind, begin + found.start) for name, found in tensors.items()
    }


def _read_number(stream: BufferedReader, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _read_text(stream: BufferedReader) -> str:
    return stream.read(_read_number(stream, "<Q")).decode()


def _read_value(stream: BufferedReader, kind: int | None = None) -> Any:
    kind = _read_number(stream, "<I") if kind is None else kind
    if kind == GGUFValueType.STRING:
        return _read_text(stream)
    if kind == GGUFValueType.ARRAY:
        inner, count = _read_number(stream, "<I"), _read_number(stream, "<Q")
        return [_read_value(stream, inner) for _ in range(count)]
    return _read_number(stream, _FORMATS[GGUFValueType(kind)])


def _read_tensor(stream: BufferedReader) -> tuple[str, StoredTensor]:
    name, dimensions = _read_text(stream), _read_number(stream, "<I")
    shape = tuple(_read_number(stream, "<Q") for _ in range(dimensions))
    kind = GGMLQuantizationType(_read_number(stream, "<I"))
    return name, StoredTensor(tuple(reversed(shape)), kind, _read_number(stream, "<Q"))


def compare_file(file: Path, source: LlamaFolder, chosen: TensorType) -> int:
    """Compare every value of a file with its source, within half a step of its type; return the number of tensors.

    Raises:
        ExportError: a tensor differs, or the file is not what was planned.
    """
    planned = {tensor.name: tensor for tensor in plan_tensors(source, chosen)}
    _, stored = read_header(file)
    if stored.keys() != planned.keys():
        raise ExportError(f"{file.name}: holds other tensors than were written; nothing was left; check the disk")

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
            f"{file.name}: {describe_count(len(wrong), 'tensor differs', 'tensors differ')} from {source.folder} by more than half a step of {chosen.name} (first: {name}, "
            f"{excess:.2g} too far); nothing was left; check the disk, and write it again"
        )
    return len(planned)


def _read_stored(file: Path, found: StoredTensor, tensor: PlannedTensor, piece: Piece) -> NDArray[numpy.floating]:
    """Return rows of the file in float32, in the order of the folder."""
    if found.shape != tensor.shape or found.kind != tensor.kind:
        raise ExportError(f"{file.name}: {tensor.name} has another shape or type than was written; check the disk")
    is_matrix = len(tensor.shape) == 2
    start, count = (piece.start, piece.stop - piece.start) if is_matrix else (0, 1)
    raw = numpy.fromfile(file, numpy.uint8, count * tensor.row_bytes, offset=found.start + start * tensor.row_bytes)
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
