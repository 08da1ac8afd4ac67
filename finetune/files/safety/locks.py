"""Locks: one process at a time writes a run directory, or makes a folder of the cache."""

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import OutputError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder within the block: a file in it that names the owner, its host and the time.

    The system releases the lock with the process, however it ends, so that of a dead process is taken over, and a line says so.

    Raises:
        OutputError: another process holds the lock, or a process of another host held it when it was last seen.
    """
    file = folder / LOCK_FILE
    try:
        descriptor = _open_locked(file, waits=False)
    except BlockingIOError:
        raise OutputError(
            f"{folder}: {_describe(_read_owner(file))} is using this folder; wait until it has ended, or choose another output"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be locked: {error.strerror}; choose another output") from error
    try:
        _take_over(folder, _read_owner(file))
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def wait_for_turn(file: Path) -> Iterator[None]:
    """Hold a lock file within the block; wait while another process holds it.

    Raises:
        OSError: the file cannot be made.
    """
    try:
        descriptor = _open_locked(file, waits=False)
    except BlockingIOError:
        logger.info("waiting for another process that makes %s", file.with_name(file.name.removesuffix(LOCK_FILE)))
        descriptor = _open_locked(file, waits=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(file: Path, *, waits: bool) -> int:
    """Open a lock file and lock it; systems without such locks open it only.

    Raises:
        BlockingIOError: another process has locked it.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform != "win32":
                _lock(descriptor, waits=waits)
            # The owner before may have removed the file while this process waited for it.
            if file.exists() and file.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, *, waits: bool) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks: nothing is promised there
        return


def _read_owner(file: Path) -> dict[str, Any]:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _take_over(folder: Path, owner: dict[str, Any]) -> None:
    """Say that the lock of a dead process is taken over.

    Raises:
        OutputError: it was made on another host, whose processes cannot be seen from here.
    """
    if not owner:
        return
    if owner.get("host") != socket.gethostname():
        raise OutputError(
            f"{folder}: {_describe(owner)} locked this folder, and this machine cannot see whether it still runs; "
            f"if it has ended, remove {folder / LOCK_FILE}"
        )
    logger.warning("%s: taking over the lock of %s, which has ended", folder, _describe(owner))


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('since')})"
