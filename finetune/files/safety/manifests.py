"""Manifests: the names, sizes and hashes of a folder's files, by which a reader tells whether the folder is whole and unchanged."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from finetune.files.json_files import write_json
from finetune.files.safety.syncing import sync_path

MANIFEST_FILE = "manifest.json"
_checked: dict[tuple[str, int, int], str | None] = {}

# A manifest finds damage, not forgery: who can change a file can change its manifest. XXH3 reads as fast as memory does, and SHA-256,
# which the first manifests hold, at a third of that at best: seconds at every start for a base model.
_WRITTEN = "xxh3_128_of_blocks"
_HASHES: dict[str, tuple[Callable[[], Any], int | None]] = {
    _WRITTEN: (xxhash.xxh3_128, 1 << 27),
    "sha256": (hashlib.sha256, None),
}
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class _Entry:
    """What a manifest says about a file: its size in bytes, the name of the hash, and the hash of its content."""

    size: int
    kind: str
    digest: str


def write_manifest(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write the manifest of a folder, after its files are on the disk; without `files` it covers all of them.

    It is written last, so a folder with a manifest was written to the end, also where the machine loses power.
    """
    chosen = sorted(files) if files is not None else _list_files(folder)
    with ThreadPoolExecutor() as threads:
        list(threads.map(sync_path, chosen))
    names = (file.relative_to(folder).as_posix() for file in chosen)
    digests = _hash_files((file, _WRITTEN) for file in chosen)
    content = {
        name: {"bytes": file.stat().st_size, _WRITTEN: digest}
        for name, file, digest in zip(names, chosen, digests, strict=True)
    }
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
        if not manifest.is_file():
            return f"its {MANIFEST_FILE} is damaged"
    except OSError:
        return f"it has no {MANIFEST_FILE}, so it was not written to the end"
    key = (str(folder.resolve()), status.st_ino, status.st_mtime_ns)
    if key not in _checked:
        _checked[key] = _compare(folder, manifest)
    return _checked[key]


def _compare(folder: Path, manifest: Path) -> str | None:
    try:
        entries = _read_entries(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST_FILE} is damaged"
    # Sizes first: a file that is gone or cut off is then found without reading gigabytes.
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if not (folder / name).is_file():
            return f"{name} is no file"
        if size != entry.size:
            return f"{name} has {size:,} bytes where {entry.size:,} were written"
    found = _hash_files((folder / name, entry.kind) for name, entry in entries.items())
    try:
        return next(
            (
                f"{name} has other content than was written"
                for (name, entry), digest in zip(entries.items(), found, strict=True)
                if digest != entry.digest
            ),
            None,
        )
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def _read_entries(content: Mapping[str, Any]) -> dict[str, _Entry]:
    entries = {}
    for name, one in content["files"].items():
        kind = next(kind for kind in (*_HASHES, "") if not kind or kind in one)  # without a hash: a KeyError
        entries[str(name)] = _Entry(int(one["bytes"]), kind, str(one[kind]))
    for name in entries:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("it leads out of its folder")
    return entries


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def _hash_files(files: Iterable[tuple[Path, str]]) -> Iterator[str]:
    """Yield the hash of each file, of the kind that stands beside it; blocks of large files are read at the same time.

    The hash of a file in blocks is that of its blocks' hashes one after the other.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor() as threads:  # reading and hashing release Python's lock
        waiting = []
        for file, kind in files:
            make, block = _HASHES[kind]
            size = file.stat().st_size
            starts = range(0, size, block) if block and size else (0,)
            waiting.append((make, [threads.submit(_hash_block, file, start, block, make) for start in starts]))
        for make, parts in waiting:
            if len(parts) == 1:
                yield parts[0].result().hex()
            else:
                whole = make()
                whole.update(b"".join(part.result() for part in parts))
                yield whole.hexdigest()


def _hash_block(file: Path, start: int, size: int | None, make: Callable[[], Any]) -> bytes:
    """Return the hash of `size` bytes of a file from `start` on, or of the rest."""
    digest, buffer = make(), memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = size
        while read := stream.readinto(buffer if left is None else buffer[:left]):
            digest.update(buffer[:read])
            left = None if left is None else left - read
    return bytes(digest.digest())
