"""Sizes of files as people write them."""

import re

from finetune.errors import OutputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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


def describe_size(count: int) -> str:
    """Return a number of bytes for a person, such as `4.9 GB`."""
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
