"""Write output folders so that each is either complete or absent."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.errors import OutputError
from finetune.files.safety.disk_errors import REASONS, translate_os_errors
from finetune.files.safety.syncing import sync_folder, sync_path

if sys.platform != "win32":
    import fcntl

_PARTIAL, _NEW = ".partial", ".new"


def expand_home(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced; one of a user who does not exist stays, and is then not found."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_writable(folder: Path) -> None:
    """Check that a folder can be made at a path, by making and removing one in the nearest folder above that exists.

    Raises:
        OutputError: it cannot: no permission, no space, a file on the way, a name that is too long.
    """
    try:
        parent = folder
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"{folder}: cannot be made: {parent} is a file, not a folder; choose another output")
        probe = Path(tempfile.mkdtemp(prefix=".finetune-", dir=parent))
        try:
            for part in folder.relative_to(parent).parts:  # a name may be too long only for this file system
                (probe / part).mkdir()
                (probe / part).rmdir()
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}; choose another output") from error


def _check_name(path: Path) -> None:
    """Refuse a path for new output that begins with a home folder, which is not replaced, or that ends in no name of its own.

    Raises:
        OutputError: with the path to write instead.
    """
    if str(path).startswith("~"):
        home = expand_home(path)
        cure = "there is no user of this name" if home == path else f"~ is not replaced here; write {home}"
        raise OutputError(f"{path}: {cure}")
    if path.name in ("", ".."):
        raise OutputError(
            f"{path}: is a folder in use, not a name for a new one; give the output a name, such as {path / 'mine'}"
        )


def check_output_free(folder: Path, ignored: str = "") -> None:
    """Refuse an output path that is a file or a folder with content; a file named `ignored` may be there.

    Raises:
        OutputError: the path is taken, is a link, or is no name for a new folder; nothing was changed.
    """
    _check_name(folder)
    if folder.is_symlink() and folder.is_dir():
        raise OutputError(
            f"{folder}: is a link to the folder {folder.resolve()}, which is not replaced; give that folder"
        )
    if folder.is_dir():
        if any(path.name != ignored for path in folder.iterdir()):
            raise OutputError(f"{folder}: the output folder exists and is not empty; choose another or remove it")
    elif folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder}: the output path exists and is not a folder; choose another")


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, and rename it to `folder` when the block ends without an error.

    So a reader sees the whole folder or none, whenever the process stops. When the block raises, the temporary folder is
    removed. After a kill it remains, under a name that starts with a dot and ends in `.partial`, until the next call for the
    same folder removes it.

    Raises:
        OutputError: `folder` exists and is not empty, or cannot be written (permission, space).
    """
    check_output_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_partials(folder)
        partial, lock = _make_partial(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made: {error.strerror} (at {error.filename}); choose another folder"
        ) from error
    try:
        with translate_os_errors(folder):
            yield partial
            partial.chmod(0o777 & ~_read_umask())
            sync_folder(partial)
            if os.name == "nt" and folder.is_dir():  # Windows does not rename over a folder, not even an empty one
                folder.rmdir()
            # Renaming over an empty folder is atomic. Over a folder with content it fails, so no files are lost.
            partial.rename(folder)
            sync_path(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def write_files_together(files: Sequence[Path]) -> Iterator[Path]:
    """Yield a temporary folder for new files of one folder; move them to their places when the block ends without an error.

    All are there, or none. The block must write each of them under its own name.

    Raises:
        OutputError: one of them exists, or cannot be written.
    """
    first = files[0]
    for file in files:
        _check_name(file)
        if file.exists() or file.is_symlink():
            raise OutputError(f"{file}: exists already; choose another name, or remove it")
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_partials(first)
        partial, lock = _make_partial(first)
    except OSError as error:
        raise OutputError(f"{first}: cannot be made: {error.strerror} (at {error.filename}); choose another") from error
    moved: list[Path] = []
    try:
        with translate_os_errors(first):
            yield partial
            sync_folder(partial)
            for file in files:
                moved.append(file)
                (partial / file.name).rename(file)
            sync_path(first.parent)
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_file_is_new(file: Path) -> None:
    """Check that nothing has this path.

    Raises:
        OutputError: the path exists, cannot be looked at, or is no name for a new file.
    """
    _check_name(file)
    try:
        exists = file.exists() or file.is_symlink()
    except OSError as error:
        raise _refuse_file(file, error) from error
    if exists:
        raise OutputError(f"{file}: exists already; choose another name, or remove it")


def _refuse_file(file: Path, error: OSError) -> OutputError:
    return OutputError(f"{file}: cannot be made: {error.strerror} (at {error.filename}); choose another")


def write_new_file(file: Path, text: str) -> None:
    """Write a text to a new file.

    Raises:
        OutputError: the path exists, or cannot be written.
    """
    check_file_is_new(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("x", encoding="utf-8", newline="\n")
    except OSError as error:
        raise _refuse_file(file, error) from error
    try:
        with translate_os_errors(file), stream:
            stream.write(text)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _make_partial(folder: Path) -> tuple[Path, int | None]:
    """Make a temporary folder, with a lock that lasts as long as this process."""
    # It gets the ending `.partial` only after it is locked. Otherwise another process could take it for that of a killed process.
    # The name is chosen before, because a signal may come between making the folder and noting its name.
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_NEW}")
    try:
        made.mkdir(0o700)
        lock = _lock(made)
        return made.rename(made.with_suffix(_PARTIAL)), lock
    except BaseException:  # also a stop by a signal, just here: nothing else removes a folder with this ending
        shutil.rmtree(made, ignore_errors=True)
        raise


def list_partials(folder: Path) -> list[Path]:
    """Return the temporary folders of `folder`, those of living and of killed processes."""
    names = (f".{glob.escape(folder.name)}.????????{ending}" for ending in (_PARTIAL, _NEW))
    return [path for name in names for path in folder.parent.glob(name)]


def _remove_stale_partials(folder: Path) -> None:
    """Remove the temporary folders of killed processes, which are those that no process has locked."""
    for stale in list_partials(folder):
        if stale.suffix == _NEW:  # a living process has not locked it yet
            continue
        lock = _lock(stale)
        if lock is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; return None if another process has locked it, or if the system has no such locks.

    The system releases the lock when the process ends, however it ends.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def check_links(folder: Path) -> None:
    """Check that no file beside the weights of a folder is a link that leads out of it: it could bring any file into a copy.

    The hub's cache links from `snapshots` to the blobs of the same repository. Weights are read as tensors only, so that they may
    lie elsewhere.

    Raises:
        OutputError: one does.
    """
    real = folder.resolve()
    home = real.parent.parent if real.parent.name == "snapshots" else real
    for path in folder.rglob("*"):
        if path.suffix != ".safetensors" and path.is_symlink() and not path.resolve().is_relative_to(home):
            raise OutputError(
                f"{path}: is a link to {path.resolve()}, out of its folder, and is not followed; copy the file there"
            )


def find_writing_obstacle(folder: Path) -> str | None:
    """Return why a folder cannot be made or written by this user, or None where it can be; a full disk is no such reason."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return REASONS[error.errno] if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else None


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
