"""Read and write sizes such as `2GB`. Only this module defines what a GB is.

A file's GB is 10^9 bytes, as on the hub and in file managers. A GPU's GB is 2^30 bytes, as GPUs are sold.
"""

import re
from collections.abc import Mapping

from finetune.errors import MachineError, OutputError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_BINARY: Mapping[str, int] = {"KIB": KIB, "MIB": MIB, "GIB": GIB}
_FILE_UNITS: Mapping[str, int] = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, **_BINARY}
_MEMORY_UNITS: Mapping[str, int] = {"": 1, "B": 1, "KB": KIB, "MB": MIB, "GB": GIB, **_BINARY}


def parse_size(text: str, name: str = "--max-shard-size") -> int:
    """Return the bytes of a file size such as `2GB` or `500MB`; `name` names the option in messages.

    Raises:
        OutputError: the text is not a size.
    """
    size = _count_bytes(text, _FILE_UNITS)
    if size < 1:
        raise OutputError(f"{name}: {text!r} is not a size; write one such as 2GB or 500MB")
    return size


def parse_memory(text: str, name: str = "memory") -> int:
    """Return the bytes of a GPU's memory size such as `8GB`, which means 8 GiB; `name` names the option in messages.

    Raises:
        MachineError: the text is not a memory size.
    """
    size = _count_bytes(text, _MEMORY_UNITS)
    if size < MIB:
        raise MachineError(f"{name}: {text!r} is not a memory size; write one such as 8GB")
    return size


def _count_bytes(text: str, units: Mapping[str, int]) -> int:
    """Return the bytes of a size, or 0 if the text is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = units.get(match.group(2).upper()) if match else None
    return int(float(match.group(1)) * unit) if match and unit else 0


def describe_size(count: int) -> str:
    """Return a file size as text, such as `4.9 GB`."""
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
