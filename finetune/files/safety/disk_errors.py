"""Turn what the system did to a program into one message: what the disk refused, and which process it ended."""

import contextlib
import errno
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune.api_arguments import name_option
from finetune.errors import MachineError, OutputError, TrainingError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the disk reports an error (input/output error)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOTEMPTY: "another process wrote it at the same time",
    errno.EEXIST: "another process wrote it at the same time",
    errno.EISDIR: "a folder has the name of a file",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file is larger than this system allows",
}
# safetensors and tokenizers are written in Rust, and end the text of such an error with the system's number.
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
# torch.save names no reason, and says less where its last block fails. Source: caffe2/serialize/inline_container.cc, std::ofstream.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|iostream error")
_TORCH_READER = re.compile(r"PytorchStreamReader")
# Source: torch/utils/data/dataloader.py and torch/csrc/DataLoader.cpp.
_LOST_WORKER = re.compile(r"DataLoader worker \(pid")
_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def translate_os_errors(folder: Path, left: str = "nothing was left there") -> Iterator[None]:
    """Turn the system's "no space", "no permission" and similar errors into an `OutputError` about `folder`.

    `left` ends the message: what is left on the disk, and how to go on.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        number = find_number(error, folder)
        if number == errno.ENOENT and not folder.exists():
            raise OutputError(f"{folder}: was removed or renamed while it was written to") from error
        if number not in REASONS:
            raise
        where = f" (at {error.filename})" if isinstance(error, OSError) and error.filename else ""
        raise OutputError(f"{folder}: cannot be written: {REASONS[number]}{where}; {left}") from error


@contextlib.contextmanager
def translate_lost_workers() -> Iterator[None]:
    """Turn the error of torch's DataLoader about a worker that was killed into a `MachineError`."""
    try:
        yield
    except RuntimeError as error:
        if _LOST_WORKER.search(repr(error)) is None:
            raise
        raise MachineError(
            "trainer.dataloader_num_workers: a process that loads batches was ended from outside, most likely for want of memory; "
            f"set it lower, and continue with {name_option('--resume')}"
        ) from error


@contextlib.contextmanager
def translate_damaged_states(checkpoint: Path) -> Iterator[None]:
    """Turn what torch raises for an optimizer's or scheduler's file that it cannot read safely into a `TrainingError`.

    The manifest finds what a disk has damaged; this is a file that somebody made.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError, IsADirectoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH_READER.search(repr(error)) is None:
            raise
        if (
            isinstance(error, OSError) and Path(error.filename or checkpoint).parent != checkpoint
        ):  # of another file of the run
            raise
        raise TrainingError(
            f"{checkpoint}: the states of its optimizer, scheduler or random numbers cannot be read ({type(error).__name__}); "
            "remove this folder, and resume from the checkpoint before it"
        ) from error


def find_number(error: BaseException, folder: Path) -> int | None:
    """Return the system's number of a failed write, also where a library has put it into an exception of its own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = repr(error)
    if (found := _RUST_NUMBER.search(text)) is not None:
        return int(found[1])
    return _probe(folder) if isinstance(error, RuntimeError) and _TORCH_WRITER.search(text) else None


def _probe(folder: Path) -> int | None:
    """Write a megabyte where a write has failed, and return the number of the error, or None where it works."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return errno.EIO
