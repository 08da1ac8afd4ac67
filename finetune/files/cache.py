"""The kit's cache: folders that are made once for each content and checked before they are used, and hashes of files."""

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from finetune.files.folders import expand_home, find_writing_obstacle
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.files.safety.locks import LOCK_FILE, wait_for_turn
from finetune.files.safety.manifests import MANIFEST_FILE, find_damage, write_manifest

logger = logging.getLogger(__name__)

CACHED_FOLDERS = ("nano", "folds", "rows")
_HASH_CHUNK = 1 << 22


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a cached folder after comparing its files with their hashes; make it where it does not exist or is damaged.

    `make` writes the folder whole. Of several processes that need it at the same time, one makes it and the others wait. Where the
    cache cannot be written, the folder is made in a temporary place, which lasts as long as this process.

    Raises:
        OutputError: the disk is full.
    """
    if folder.is_dir() and find_damage(folder) is None:
        return folder
    if (reason := find_writing_obstacle(folder)) is not None:
        return _make_for_this_process(folder, make, reason)
    with translate_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_turn(folder.with_name(f"{folder.name}{LOCK_FILE}")):
            if folder.is_dir() and (damage := find_damage(folder)) is not None:
                if (folder / MANIFEST_FILE).is_file():
                    logger.warning("%s: the cache is damaged (%s); making it again", folder, damage)
                shutil.rmtree(folder)
            if not folder.is_dir():
                make(folder)
                write_manifest(folder)
    return folder


def _make_for_this_process(folder: Path, make: Callable[[Path], object], reason: str) -> Path:
    """Make a folder of the cache in a temporary place."""
    own = _find_temporary_cache(str(find_cache()), reason) / folder.parent.name / folder.name
    if not own.is_dir():
        make(own)
    return own


@functools.cache
def _find_temporary_cache(cache: str, reason: str) -> Path:
    logger.warning(
        "%s: the cache cannot be written (%s); going on without it: set FINETUNE_CACHE to a folder that can be written to keep "
        "what is prepared",
        cache,
        reason,
    )
    made = Path(tempfile.mkdtemp(prefix="yulan-finetune-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def examine_cache() -> dict[str, list[str]]:
    """Return what is wrong with each folder of the cache, by the folder's path: `[]` where it is whole."""
    found: dict[str, list[str]] = {}
    for kind in CACHED_FOLDERS:
        for folder in sorted(path for path in find_cache().glob(f"{kind}/*") if path.is_dir() and path.name[0] != "."):
            damage = find_damage(folder)
            found[str(folder)] = [] if damage is None else [damage]
    return found


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
    if (known := _recall(remembered)) is not None:
        return known
    digest = hashlib.sha256()
    with real.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    _remember(remembered, digest.hexdigest())
    return digest.hexdigest()


def _recall(path: Path) -> str | None:
    """Return a remembered hash, or None where there is none, or the file is damaged: its second half is the first one's hash."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    known, check = text[:64], text[64:]
    return known if len(known) == 64 and check == hashlib.sha256(known.encode()).hexdigest() else None


def _remember(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + hashlib.sha256(text.encode()).hexdigest(), encoding="ascii")
        partial.replace(path)
    except OSError:  # without a cache the kit only takes longer
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
