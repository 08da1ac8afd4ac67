"""Read the weights of a folder tensor by tensor, from one safetensors file or from several with their index.

The kit reads and checks the headers itself and does not map the whole file: the pages of a map count as resident memory once they
are read, and a truncated file would be noticed only at the first missing tensor.

Source of the format: github.com/huggingface/safetensors, README, "Format".
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from finetune.errors import CheckpointError, describe_count

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The types that weights are written in, by the names that people and configurations give them.
WEIGHT_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CHECKED_ELEMENTS = 1 << 22
_HEADER_LIMIT = 100_000_000  # the format's own limit, in bytes
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a type, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor: its file, and the range of its bytes there."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFolder:
    """The tensors of a checkpoint folder by name. It holds no file open, and several threads may read at the same time."""

    folder: Path
    entries: Mapping[str, TensorEntry]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the files."""
        return tuple(self.entries)

    @property
    def total_bytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(entry.end - entry.start for entry in self.entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored type without reading it."""
        return self.entries[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into new memory.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        entry = self.entries[name]
        return self._read_bytes(name, entry.start, entry.end).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read the rows (first indices) of a tensor from `start` to `stop` (exclusive) into new memory.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        entry = self.entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        found = self._read_bytes(name, entry.start + start * row, entry.start + stop * row)
        return found.reshape(stop - start, *entry.shape[1:])

    def _read_bytes(self, name: str, start: int, end: int) -> torch.Tensor:
        entry = self.entries[name]
        # torch.empty does not fill the memory with zeros first, as a bytearray does; for gigabytes that takes noticeable time.
        found = torch.empty(end - start, dtype=torch.uint8)
        view, filled = found.numpy().data, 0
        with entry.file.open("rb", buffering=0) as file:
            file.seek(start)
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(
                        f"{entry.file}: ends within the tensor {name}; the file was changed while it was read"
                    )
                filled += count
        return found.view(entry.dtype)


def open_tensors(folder: Path) -> TensorFolder:
    """Open the safetensors weights of a folder and check that they are complete.

    Raises:
        CheckpointError: the folder has no weights or only pickled ones, a file is missing or truncated, or the index does not
            fit the files.
    """
    if (folder / INDEX_FILE).is_file():
        return TensorFolder(folder, _open_shards(folder))
    if (folder / SINGLE_FILE).is_file():
        return TensorFolder(folder, read_header(folder / SINGLE_FILE))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when they are opened; "
            "download the checkpoint's safetensors version, or convert them to model.safetensors if you trust them"
        )
    raise CheckpointError(f"{folder}: holds no weights (neither {SINGLE_FILE} nor {INDEX_FILE})")


def open_tensor_files(folder: Path) -> TensorFolder:
    """Open all safetensors files of a folder, whatever their names.

    Raises:
        CheckpointError: one is damaged.
    """
    entries: dict[str, TensorEntry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        entries |= read_header(file)
    return TensorFolder(folder, entries)


def find_non_finite(tensors: TensorFolder) -> str | None:
    """Return the name of the first tensor with a NaN or an infinite number, or None; some rows are in memory at a time."""
    for name, entry in tensors.entries.items():
        if not entry.dtype.is_floating_point or 0 in entry.shape:
            continue
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, _CHECKED_ELEMENTS // max(1, math.prod(entry.shape[1:])))
        for start in range(0, rows, step):
            part = tensors.read_rows(name, start, min(start + step, rows)) if entry.shape else tensors.read(name)
            # Minimum and maximum are NaN if any number is, and computing them needs no second copy.
            if not torch.stack(torch.aminmax(part)).isfinite().all():
                return name
    return None


def _open_shards(folder: Path) -> dict[str, TensorEntry]:
    index = _read_index(folder / INDEX_FILE)
    headers = {shard: read_header(folder / shard) for shard in sorted(set(index.values()))}
    entries: dict[str, TensorEntry] = {}
    for shard, header in headers.items():
        for name, entry in header.items():
            if index.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: holds the tensor {name}, which {INDEX_FILE} places in {index.get(name, 'no file')}; download both again"
                )
            entries[name] = entry
    absent = [name for name in index if name not in entries]
    if absent:
        raise CheckpointError(
            f"{folder / index[absent[0]]}: lacks {describe_count(len(absent), 'tensor')} that {INDEX_FILE} names (first: {absent[0]}); download it again"
        )
    return entries


def _read_index(path: Path) -> dict[str, str]:
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(shard) for name, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not an index of weights (expected an object with weight_map)") from error
    for shard in sorted(set(pairs.values())):
        # A downloaded index must not lead to files outside its folder.
        if PurePosixPath(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{path}: names the file {shard!r}, which lies outside the folder; the index may be malicious, download it again "
                "from a source that you trust"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names the file {shard!r}; only .safetensors files are read")
        if not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path.parent}: the shard {shard} that {path.name} names is missing; download it again"
            )
    return pairs


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, after comparing its header with its size.

    Raises:
        CheckpointError: there is no such file, or it is truncated, or is not safetensors.
    """
    if not path.is_file():  # a pipe would never end
        raise CheckpointError(f"{path}: {'is no file' if path.exists() else 'is missing'}; download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _HEADER_LIMIT + 1
        if length > _HEADER_LIMIT:
            raise CheckpointError(f"{path}: is not a safetensors file (no header in its first 8 of {size:,} bytes)")
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path}: is truncated within its header ({size:,} bytes); download it again")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _read_entry(path, name, value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); download it again") from error
    needed = max((entry.end for entry in entries.values()), default=8 + length)
    if size != needed:
        raise CheckpointError(
            f"{path}: has {size:,} bytes where its header needs {needed:,}; it is truncated or damaged, download it again"
        )
    return entries


def _read_entry(path: Path, name: str, value: Mapping[str, Any], offset: int) -> TensorEntry:
    if value["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: the tensor {name} has the type {value['dtype']}; known are {', '.join(DTYPES)}")
    dtype, shape = DTYPES[value["dtype"]], tuple(int(extent) for extent in value["shape"])
    start, end = (int(position) for position in value["data_offsets"])
    if start < 0 or any(extent < 0 for extent in shape) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - start} bytes for the shape {list(shape)} of {value['dtype']}")
    return TensorEntry(path, dtype, shape, offset + start, offset + end)


def list_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted by name."""
    return sorted({entry.file for entry in open_tensors(folder).entries.values()}, key=lambda path: os.fspath(path))
