"""Run one verb of the command line and exit with its status."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from finetune.cli.libraries import quiet_libraries
from finetune.cli.parser import make_parser
from finetune.cli.printing import BUG, INTERRUPTED, SUCCESS, USER_ERROR
from finetune.errors import FinetuneError
from finetune.files.terminal import escape_controls

# What a path that the user gave, or the disk under it, causes anywhere; it is no bug.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_MACHINE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, *_FULL)
# A write that fails does not say where.
_NO_NAME = "standard output, or a file that was being written"
# Seconds before a signal is sent again whose exception was dropped, and within which an error is taken for its doing.
_AGAIN, _AFTER_SIGNAL = 0.05, 5.0


def enter() -> None:
    """Run the verb of this process's command line, and end the process as `_Leaving` does."""
    _fill_closed_streams()
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = _Messages(os.fdopen(2, "wb", closefd=False), encoding=encoding, line_buffering=True)
    leaving = _Leaving()
    atexit.register(leaving.leave)  # the first to be registered runs last
    try:
        main()
    except SystemExit as stopped:
        leaving.status = stopped.code if isinstance(stopped.code, int) else BUG
        raise
    except KeyboardInterrupt:
        leaving.status = INTERRUPTED
        raise


def _fill_closed_streams() -> None:
    """Let nothing take the place of a stream that the caller has closed, as `2>&-` does.

    Python prints to standard output what is meant for a standard error that is closed. The next file that is opened would get the
    number of the closed stream, and what a library in C++ writes to it would stand in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest free number; processes that are started later have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


class _Messages(io.TextIOWrapper):
    """Standard error of a work that goes on where nobody reads its messages any more, as in `train … 2>&1 | head`."""

    def write(self, text: str) -> int:
        """Write a text, or drop it where the reading program has ended."""
        with self._dropped():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it where the reading program has ended."""
        with self._dropped():
            super().flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A script of bash that is called with `2>&-` hands on its own file, open for reading, under the number 2.
            if error.errno not in (errno.EPIPE, errno.EBADF):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # also for what is still buffered, and for libraries in C++


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 success, 2 an error in the user's input, 1 a bug (with its traceback), 130 interrupted."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A console that cannot show Chinese, or that sends bytes of another encoding, must not end the run.
            stream.reconfigure(errors="replace")
    sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    signals, name = _Signals(), "finetune"
    try:
        arguments = make_parser().parse_args(argv)
        name = f"finetune {arguments.verb}"
        signals.watch()
        _check_current_folder()
        quiet_libraries()
        status: int = arguments.run(arguments)
        _flush_output()
    except FinetuneError as error:
        _print_fault(name, str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reading program (head, less) has ended. The rest of the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except OSError as error:
        place = error.filename or (_NO_NAME if error.errno in _FULL else None)
        if error.errno not in _OF_THE_MACHINE or place is None:
            raise
        _print_fault(name, f"{place}: {error.strerror}")
        return USER_ERROR
    except Exception:
        if signals.just_stopped is None:
            raise
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signals.just_stopped
    finally:
        signals.leave()
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


def _flush_output() -> None:
    if sys.stdout is not None:  # a caller may close it (`>&-`)
        sys.stdout.flush()


def _print_fault(name: str, message: str) -> None:
    """Print what is wrong; what only one process of a launch meets, such as a file that its machine lacks, only that one can say."""
    # Read as text, since the message may be that these variables are no numbers.
    size, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    process = f" (process {rank})" if size not in ("", "1") and rank not in ("", "0") else ""
    with contextlib.suppress(OSError):  # the status says it, too, where standard error is a file on a full disk
        print(escape_controls(f"{name}{process}: {message}"), file=sys.stderr)


class _Leaving:
    """Ends a process with its status when its work is done, without taking apart all that it has loaded.

    With torch that takes half a second. A destructor of its C++ libraries waits for threads of gloo that may still run: one launch in
    some hundreds ended in "terminate called without an active exception", and `accelerate launch` reported a failure.
    """

    def __init__(self) -> None:
        self.status = BUG

    def leave(self) -> None:
        """Write what is buffered and end."""
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except BrokenPipeError:
                continue  # the reading program has ended
            except OSError:
                self.status = self.status or USER_ERROR
        os._exit(self.status)


class _Signals:
    """Ends a verb at Ctrl-C and at SIGTERM by an exception, so that partly written folders are removed.

    Python drops an exception that is raised in a finalizer or in a callback of the garbage search, where a signal that came during a
    long operation of torch is handled most often; then the signal is sent again. A library in C++ may turn it into an error of its own.
    """

    def __init__(self) -> None:
        self._number = 0
        self._time = -math.inf
        self._before = sys.unraisablehook

    def watch(self) -> None:
        """Handle both signals. Ctrl-C stays ignored where it was, as in the background of a shell."""
        signal.signal(signal.SIGTERM, self._stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._stop)
        sys.unraisablehook = self._send_again

    def leave(self) -> None:
        """Give back Ctrl-C and the report of dropped exceptions."""
        sys.unraisablehook = self._before
        if signal.getsignal(signal.SIGINT) == self._stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def just_stopped(self) -> int | None:
        """The number of a signal that came within the last seconds, so that an error is its doing."""
        return self._number if time.monotonic() - self._time < _AFTER_SIGNAL else None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._number, self._time = number, time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _send_again(self, dropped: sys.UnraisableHookArgs) -> None:
        if self.just_stopped is None or not issubclass(dropped.exc_type, KeyboardInterrupt | SystemExit):
            self._before(dropped)
            return
        # Raised here it would be dropped as well.
        timer = threading.Timer(_AGAIN, _send, (self._number,))
        timer.daemon = True
        timer.start()


def _send(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)
