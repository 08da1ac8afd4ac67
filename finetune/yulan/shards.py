"""Write weights as safetensors shards, a few rows in memory at a time.

Reading, arithmetic and writing overlap: every core takes a piece of its own through all three, with one writing at a time.

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
# A piece and its float64 copy stay within a processor's cache; larger ones cost memory and gain no time.
_PIECE_ELEMENTS = 1 << 19
_KEPT_BYTES = 31 << 20  # glibc adapts to blocks below 32 MiB
_FLUSHED_BYTES = 1 << 27

Result = TypeVar("Result")


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


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor: those from `start` up to `stop`. A tensor of fewer than two dimensions is one piece."""

    name: str
    start: int
    stop: int


class RowSource(Protocol):
    """Tensors that are made a piece at a time, several at once in threads."""

    def needs_whole(self, name: str) -> bool:
        """Tell whether the rows of a tensor depend on one another, so that they must come in one piece."""

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Read what is stored and return what is to be written."""


@dataclass(frozen=True)
class StoredTensors:
    """Tensors in memory, to be written as they are."""

    tensors: Mapping[str, torch.Tensor]

    def needs_whole(self, name: str) -> bool:
        """Return True: nothing is saved by cutting what is in memory."""
        return True

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Return the tensor."""
        return self.tensors[piece.name]


def list_pieces(specs: Sequence[TensorSpec], source: RowSource) -> list[Piece]:
    """Cut tensors into pieces, in order."""
    pieces = []
    for spec in specs:
        rows = spec.shape[0] if spec.shape else 1
        is_whole = len(spec.shape) < 2 or source.needs_whole(spec.name)
        step = max(1, rows if is_whole else _PIECE_ELEMENTS // math.prod(spec.shape[1:]))
        pieces += [Piece(spec.name, start, min(start + step, rows)) for start in range(0, rows, step)]
    return pieces


def run_pieces(pieces: Sequence[Piece], work: Callable[[Piece], Result]) -> Iterator[Result]:
    """Yield what `work` returns for every piece, in order, with as many at once as there are cores.

    The first error is raised, and what has not begun is dropped.
    """
    threads = torch.get_num_threads()
    # glibc gives memory of this size back to the system at every free, and a page costs more to get than to fill; once a
    # larger block was freed it keeps them.
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    # One thread for each piece: torch's own would wait for one another busily and starve those that read and write.
    executor = ThreadPoolExecutor(threads + 1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from executor.map(work, pieces)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


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
    """Sends what was written to the disk while more is made, and lets go of the memory that held it.

    Gigabytes of output would otherwise push what is still to be read, and what other programs need, out of the system's
    memory; and getting new memory for each of them takes longer than writing them.
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
            sent.result()  # raises the disk's error, of which the system tells only once

    def count(self, file: FileIO, size: int) -> None:
        """Add to what waits; send it when it is enough to keep the disk busy."""
        self.waiting += size
        if self.waiting >= _FLUSHED_BYTES:
            self.waiting = 0
            self.sent.append(self.executor.submit(_let_go, file))

    def close_file(self, file: FileIO) -> None:
        """Send the rest of a file and close it, after what was sent before."""
        self.sent.append(self.executor.submit(_close, file))


def _let_go(file: FileIO) -> None:
    # Begins to write what is not on the disk yet, and frees what is. Not every system has it; it is a help, no promise.
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
    text += b" " * (-len(text) % 8)  # the tensors then start at a multiple of 8
    return struct.pack("<Q", len(text)) + text
