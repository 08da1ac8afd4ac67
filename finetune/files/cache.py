"""The kit's cache: folders that are made once for each content, and hashes of files."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.errors import OutputError
from finetune.files.folders import expand_home

_HASH_CHUNK = 1 << 22


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a cached folder, and make it if it does not exist.

    Two processes may make it at the same time. The first to finish wins, and the other uses its result.
    """
    if folder.is_dir():
        return folder
    try:
        make(folder)
    except OutputError:
        if not folder.is_dir():
            raise
    return folder


def find_cache() -> Path:
    """Return the folder for folds and fingerprints: `FINETUNE_CACHE`, or the system's own place for caches."""
    if chosen := os.environ.get("FINETUNE_CACHE"):
        return expand_home(chosen)
    if sys.platform == "win32":
        return expand_home(os.environ.get("LOCALAPPDATA", "~")) / "yulan-finetune"
    return expand_home(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "yulan-finetune"


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's content; the cache keeps it under the file's path, inode, size and times."""
    real = file.resolve()
    status = real.stat()
    identity = f"{real}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    remembered = find_cache() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if remembered.is_file() and len(known := remembered.read_text(encoding="utf-8")) == 64:
        return known
    digest = hashlib.sha256()
    with real.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    _remember(remembered, digest.hexdigest())
    return digest.hexdigest()


def _remember(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        return  # without a cache the kit only takes longer
