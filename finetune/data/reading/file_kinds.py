"""Tell by its name whether a file holds rows, and how they are written."""

from collections.abc import Mapping
from pathlib import Path

# By ending, with the name that pyarrow has for each.
COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def find_kind(path: Path) -> str:
    """Return the ending that says how a file is written, without that of its compression."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def has_known_ending(path: Path) -> bool:
    """Tell whether a file is of a kind that can be read, by its name."""
    return find_kind(path) in KINDS
