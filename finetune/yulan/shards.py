"""Write weights as safetensors shards, a few rows in memory at a time.

Reading, arithmetic and writing overlap: one thread reads ahead, one writes behind, and the calling one computes between them.

Source of the format: github.com/huggingface/safetensors, README, "Format"; of the shards' names and index: transformers'
`save_pretrained`.
"""

import contextlib
import json
import math
import re
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from finetune.errors import OutputError
from finetune.yulan.tensors import DTYPES, INDEX_FILE, SINGLE_FILE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A piece and its float64 copy stay within a processor's cache; larger ones cost memory and gain no time.
_PIECE_ELEMENTS = 1 << 20
_AHEAD = 4  # pieces that are read, and that wait to be written
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its place is planned before its values exist."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `2GB` or `500MB`.

    Raises:
        OutputError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or float(match.group(1)) * unit < 1:
        raise OutputError(f"--max-shard-size: {text!r} is not a size; write one such as 2GB or 500MB")
    return int(float(match.group(1)) * unit)


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor: those from `start` up to `stop`. A tensor of fewer than two dimensions is one piece."""

    name: str
    start: int
    stop: int


class RowSource(Protocol):
    """Tensors that are made from stored ones, a piece at a time."""

    def needs_whole(self, name: str) -> bool:
        """Tell whether the rows of a tensor depend on one another, so that they must come in one piece."""

    def read_piece(self, piece: Piece) -> torch.Tensor:
        """Return what is stored; no arithmetic, it is called from another thread."""

    def finish_piece(self, piece: Piece, stored: torch.Tensor) -> torch.Tensor:
        """Return what is to be written; no reading."""


@dataclass(frozen=True)
class StoredTensors:
    """Tensors in memory, to be written as they are."""

    tensors: Mapping[str, torch.Tensor]

    def needs_whole(self, name: str) -> bool:
        """Return True: nothing is saved by cutting what is in memory."""
        return True

    def read_piece(self, piece: Piece) -> torch.Tensor:
        """Return the tensor."""
        return self.tensors[piece.name]

    def finish_piece(self, piece: Piece, stored: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return stored


def split_pieces(spec: TensorSpec, *, whole: bool) -> Iterator[Piece]:
    """Yield the pieces of a tensor, in order."""
    rows = spec.shape[0] if spec.shape else 1
    step = rows if whole or len(spec.shape) < 2 else _PIECE_ELEMENTS // max(1, math.prod(spec.shape[1:]))
    for start in range(0, rows, max(1, step)):
        yield Piece(spec.name, start, min(start + step, rows))


def write_shards(folder: Path, specs: Sequence[TensorSpec], source: RowSource, max_shard_bytes: int) -> int:
    """Write tensors as their source gives them, into as few files as the limit allows; return their bytes.

    A tensor larger than the limit gets a file of its own. Every piece is read and finished once, in order.
    """
    shards = _plan_shards(specs, max_shard_bytes)
    total = sum(spec.bytes for spec in specs)
    names = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_encode_header(shard))
            _write_tensors(file, shard, source)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


def _write_tensors(file: BinaryIO, specs: Sequence[TensorSpec], source: RowSource) -> None:
    planned = {spec.name: spec for spec in specs}
    waiting: deque[Future[None]] = deque()

    def write(piece: Piece, tensor: torch.Tensor) -> None:
        spec = planned[piece.name]
        rows = () if not spec.shape else (piece.stop - piece.start, *spec.shape[1:])
        if tuple(tensor.shape) != rows or tensor.dtype != spec.dtype:
            raise ValueError(f"{piece}: planned {rows} of {spec.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}")
        # Raw bytes: numpy has no bfloat16, but every type can be seen as bytes.
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    pieces = [piece for spec in specs for piece in split_pieces(spec, whole=source.needs_whole(spec.name))]
    with _start_thread() as writer:
        for piece, stored in read_ahead(pieces, source):
            waiting.append(writer.submit(write, piece, source.finish_piece(piece, stored)))
            if len(waiting) > _AHEAD:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def read_ahead(pieces: Sequence[Piece], source: RowSource) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Yield every piece with what is stored of it, while another thread reads the next ones."""
    with _start_thread() as reader:
        coming: deque[Future[torch.Tensor]] = deque(
            reader.submit(source.read_piece, piece) for piece in pieces[:_AHEAD]
        )
        for number, piece in enumerate(pieces):
            stored = coming.popleft().result()
            if number + _AHEAD < len(pieces):
                coming.append(reader.submit(source.read_piece, pieces[number + _AHEAD]))
            yield piece, stored


@contextlib.contextmanager
def _start_thread() -> Iterator[ThreadPoolExecutor]:
    """Yield one thread, which drops what it has not begun when the block ends in an error."""
    executor = ThreadPoolExecutor(1)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _plan_shards(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    return shards


def _encode_header(specs: Sequence[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.bytes],
        }
        position += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors then start at a multiple of 8
    return struct.pack("<Q", len(text)) + text
