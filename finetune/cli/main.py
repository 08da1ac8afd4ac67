"""Run one verb of the command line and exit with its status."""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from finetune.cli.libraries import quiet_libraries
from finetune.cli.parser import make_parser
from finetune.cli.printing import BUG, INTERRUPTED, SUCCESS, USER_ERROR
from finetune.errors import FinetuneError
from finetune.files.launcher import is_launched
from finetune.files.terminal import escape_controls

# What a path that the user gave, or the disk under it, causes anywhere; it is no bug.
_OF_THE_MACHINE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 success, 2 an error in the user's input, 1 a bug (with its traceback), 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show Chinese must not end the run
    leaving = _Leaving()
    try:
        leaving.status = _run(argv, leaving)
    except SystemExit as stopped:
        leaving.status = stopped.code if isinstance(stopped.code, int) else BUG
        raise
    sys.exit(leaving.status)


def _run(argv: Sequence[str] | None, leaving: _Leaving) -> int:
    arguments = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _check_current_folder()
        if is_launched():
            atexit.register(leaving.leave)  # the first to be registered runs last
        quiet_libraries()
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except FinetuneError as error:
        _print_fault(arguments.verb, str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"finetune {arguments.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reading program (head, less) has ended. The rest of the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE or error.filename is None:
            raise
        _print_fault(arguments.verb, f"{error.filename}: {error.strerror}")
        return USER_ERROR
    return status


def _check_current_folder() -> None:
    """Refuse to work in a folder that has been removed, where no relative path has a meaning.

    Raises:
        FinetuneError: it has been removed.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise FinetuneError("the current folder has been removed; change to another folder") from error


def _print_fault(verb: str, message: str) -> None:
    """Print what is wrong; what only one process of a launch meets, such as a file that its machine lacks, only that one can say."""
    # Read as text, since the message may be that these variables are no numbers.
    size, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    process = f" (process {rank})" if size not in ("", "1") and rank not in ("", "0") else ""
    print(escape_controls(f"finetune {verb}{process}: {message}"), file=sys.stderr)


class _Leaving:
    """Ends a process of a launch with its status, without the destructors of C++ libraries.

    One of them waits for threads of gloo that may still run: one launch in some hundreds ended in "terminate called without an active
    exception" after its work was done, and `accelerate launch` reported a failure.
    """

    def __init__(self) -> None:
        self.status = BUG

    def leave(self) -> None:
        """Write what is buffered and end."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self.status)


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit by an exception, so that partly written folders are removed."""
    sys.exit(128 + number)
