"""Write Llama weights as safetensors shards, one tensor in memory at a time.

Source of the format: github.com/huggingface/safetensors, README, "Format"; of the shards' names and index: transformers'
`save_pretrained`.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.errors import OutputError
from finetune.yulan.tensors import DTYPES, INDEX_FILE, SINGLE_FILE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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


def write_shards(
    folder: Path, specs: Sequence[TensorSpec], produce: Callable[[str], torch.Tensor], max_shard_bytes: int
) -> int:
    """Write tensors as `produce(name)` gives them, into as few files as the limit allows; return their bytes.

    A tensor larger than the limit gets a file of its own. `produce` is called once for each name, in order.
    """
    shards = _plan_shards(specs, max_shard_bytes)
    total = sum(spec.bytes for spec in specs)
    names = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, produce)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


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


def _write_file(path: Path, specs: Sequence[TensorSpec], produce: Callable[[str], torch.Tensor]) -> None:
    with path.open("wb") as file:
        file.write(_encode_header(specs))
        for spec in specs:
            tensor = produce(spec.name)
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"{spec.name}: planned {spec.shape} of {spec.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
            # Raw bytes: numpy has no bfloat16, but every type can be seen as bytes.
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


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
