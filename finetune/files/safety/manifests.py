"""Manifests: the names, sizes and hashes of a folder's files, by which a reader tells whether the folder is whole and unchanged."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.files.folders import sync_path
from finetune.files.json_files import write_json

MANIFEST_FILE = "manifest.json"
_checked: dict[tuple[str, int, int], str | None] = {}


@dataclass(frozen=True)
class _Entry:
    """What a manifest says about a file: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


def write_manifest(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write the manifest of a folder, after its files are on the disk; without `files` it covers all of them.

    It is written last, so a folder with a manifest was written to the end, also where the machine loses power.
    """
    chosen = sorted(files) if files is not None else _list_files(folder)
    with ThreadPoolExecutor() as threads:  # hashing releases Python's lock
        entries = list(threads.map(_measure, chosen))
    names = (file.relative_to(folder).as_posix() for file in chosen)
    content = {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in zip(names, entries, strict=True)}
    write_json(folder / MANIFEST_FILE, {"files": content})
    sync_path(folder / MANIFEST_FILE)
    for inner in {folder, *(file.parent for file in chosen)}:
        sync_path(inner)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder by its manifest, or None where every file is as it was written.

    A folder is hashed once a process: it is looked at again only where its manifest was written anew.
    """
    manifest = folder / MANIFEST_FILE
    try:
        status = manifest.stat()
    except OSError:
        return f"it has no {MANIFEST_FILE}, so it was not written to the end"
    key = (str(folder.resolve()), status.st_ino, status.st_mtime_ns)
    if key not in _checked:
        _checked[key] = _compare(folder, manifest)
    return _checked[key]


def _compare(folder: Path, manifest: Path) -> str | None:
    try:
        entries = _read_entries(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST_FILE} is damaged"
    # Sizes first: a file that is gone or cut off is then found without reading gigabytes.
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.size:
            return f"{name} has {size:,} bytes where {entry.size:,} were written"
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: _measure(folder / name, is_written=False), entries)
        try:
            return next(
                (
                    f"{name} has other content than was written"
                    for name, entry in zip(entries, found, strict=True)
                    if entry != entries[name]
                ),
                None,
            )
        except OSError as error:
            return f"{error.filename} cannot be read ({error.strerror})"


def _read_entries(content: Mapping[str, Any]) -> dict[str, _Entry]:
    entries = {str(name): _Entry(int(one["bytes"]), str(one["sha256"])) for name, one in content["files"].items()}
    for name in entries:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("it leads out of its folder")
    return entries


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def _measure(file: Path, is_written: bool = True) -> _Entry:
    """Return size and hash of a file; one that was just written is sent to the disk first."""
    if is_written:
        sync_path(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return _Entry(os.fstat(stream.fileno()).st_size, digest)
