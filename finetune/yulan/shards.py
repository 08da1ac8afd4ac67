"""Write weights as safetensors shards, with only a few rows in memory at a time.

Reading, arithmetic and writing overlap: each core reads, computes and writes one piece, and only one core writes at a time.

Source of the format: github.com/huggingface/safetensors, README, "Format"; of the shards' names and index: transformers'
`save_pretrained`.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch

from finetune.files.json_files import write_json
from finetune.yulan.tensors import DTYPES, INDEX_FILE, SINGLE_FILE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A piece and its float64 copy fit a processor's cache. Larger pieces take more memory and save no time.
_PIECE_ELEMENTS = 1 << 19
_KEPT_BYTES = 31 << 20  # glibc raises its mmap threshold only for blocks below 32 MiB
_FLUSHED_BYTES = 1 << 27

Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorSpec:
    """The name, shape and type of a tensor that is to be written; its place in the file follows from these."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """The rows of a tensor from `start` to `stop` (exclusive). A tensor of fewer than two dimensions is one piece."""

    name: str
    start: int
    stop: int


class RowSource(Protocol):
    """A source of tensors that makes them piece by piece; several threads call it at the same time."""

    def needs_whole(self, name: str) -> bool:
        """Return whether a tensor must be made in one piece, because its rows depend on one another."""

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Return the rows of a piece, with the type that is to be written."""


@dataclass(frozen=True)
class StoredTensors:
    """Tensors in memory that are written unchanged."""

    tensors: Mapping[str, torch.Tensor]

    def needs_whole(self, name: str) -> bool:
        """Return True: pieces would save no memory, since the tensors are in memory already."""
        return True

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Return the tensor."""
        return self.tensors[piece.name]


def list_pieces(specs: Sequence[TensorSpec], source: RowSource) -> list[Piece]:
    """Return the pieces of all tensors, in order."""
    pieces = []
    for spec in specs:
        rows = spec.shape[0] if spec.shape else 1
        is_whole = len(spec.shape) < 2 or source.needs_whole(spec.name)
        step = max(1, rows if is_whole else _PIECE_ELEMENTS // math.prod(spec.shape[1:]))
        pieces += [Piece(spec.name, start, min(start + step, rows)) for start in range(0, rows, step)]
    return pieces


def run_pieces(pieces: Sequence[Piece], work: Callable[[Piece], Result]) -> Iterator[Result]:
    """Yield the results of `work` for all pieces, in order; one thread for each core runs it.

    The first error is raised, and pieces whose work has not begun are dropped.
    """
    threads = torch.get_num_threads()
    # By default glibc returns blocks of a piece's size to the system at every free, and getting new pages takes longer than
    # filling them. After one larger block was freed, glibc keeps such blocks.
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    # torch uses one thread for each piece: more would wait for each other in busy loops, and slow down reading and writing.
    executor = ThreadPoolExecutor(threads + 1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from executor.map(work, pieces)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def write_shards(folder: Path, specs: Sequence[TensorSpec], source: RowSource, max_shard_bytes: int) -> int:
    """Write the tensors of a source into as few files as the limit allows; return their size in bytes.

    A tensor larger than the limit gets a file of its own. Each piece is made once, in order.
    """
    shards = _plan_shards(specs, max_shard_bytes)
    total = sum(spec.bytes for spec in specs)
    names = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    with _Flusher() as flusher:
        for name, shard in zip(names, shards, strict=True):
            file = (folder / name).open("wb", buffering=0)
            try:
                _write_tensors(file, shard, source, flusher)
            finally:
                flusher.close_file(file)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
    return total


def _write_tensors(file: FileIO, specs: Sequence[TensorSpec], source: RowSource, flusher: "_Flusher") -> None:
    header = _encode_header(specs)
    file.write(header)
    planned: dict[str, tuple[int, TensorSpec]] = {}
    position = len(header)
    for spec in specs:
        planned[spec.name] = (position, spec)
        position += spec.bytes
    lock = threading.Lock()

    def write(piece: Piece) -> None:
        start, spec = planned[piece.name]
        rows = (piece.stop - piece.start, *spec.shape[1:]) if spec.shape else ()
        tensor = source.make_rows(piece)
        if tuple(tensor.shape) != rows or tensor.dtype != spec.dtype:
            raise ValueError(f"{piece}: planned {rows} of {spec.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}")
        start += piece.start * math.prod(spec.shape[1:]) * spec.dtype.itemsize
        # Raw bytes: numpy has no bfloat16, but every type can be seen as bytes.
        view = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        with lock:
            file.seek(start)
            flusher.count(file, len(view))
            while view:
                view = view[file.write(view) :]

    for _ in run_pieces(list_pieces(specs, source), write):
        pass


class _Flusher:
    """Flushes written bytes to the disk while more are made, and drops them from the system's page cache.

    Otherwise gigabytes of output would replace in that cache the files that are still to be read. Getting new pages for the
    output also takes longer than writing it.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.sent: list[Future[None]] = []
        self.executor = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown(wait=True)
        for sent in self.sent:
            sent.result()  # raises the disk's error, which the system reports only once

    def count(self, file: FileIO, size: int) -> None:
        """Count written bytes, and flush the file when there are enough to keep the disk busy."""
        self.waiting += size
        if self.waiting >= _FLUSHED_BYTES:
            self.waiting = 0
            self.sent.append(self.executor.submit(_let_go, file))

    def close_file(self, file: FileIO) -> None:
        """Flush the rest of a file and close it, after the earlier flushes."""
        self.sent.append(self.executor.submit(_close, file))


def _let_go(file: FileIO) -> None:
    # This begins to write pages that are not on the disk yet, and frees those that are. Systems without this call work too.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _close(file: FileIO) -> None:
    with file:
        os.fsync(file.fileno())
        _let_go(file)


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
    text += b" " * (-len(text) % 8)  # the tensors then begin at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text
