"""Run one verb of the command line and exit with its status."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from finetune.cli.libraries import is_main_process, quiet_libraries
from finetune.cli.parser import make_parser
from finetune.cli.printing import INTERRUPTED, SUCCESS, USER_ERROR
from finetune.errors import FinetuneError

# What a path that the user gave, or the disk under it, causes anywhere; it is no bug.
_OF_THE_MACHINE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 success, 2 an error in the user's input, 1 a bug (with its traceback), 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show Chinese must not end the run
    arguments = make_parser().parse_args(argv)
    quiet_libraries()
    signal.signal(signal.SIGTERM, _stop)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except FinetuneError as error:
        if is_main_process():
            print(f"finetune {arguments.verb}: {error}", file=sys.stderr)
        status = USER_ERROR
    except BrokenPipeError:
        # The reading program (head, less) has ended. The rest of the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = SUCCESS
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE or error.filename is None:
            raise
        print(f"finetune {arguments.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        status = USER_ERROR
    except KeyboardInterrupt:
        print(f"finetune {arguments.verb}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit by an exception, so that partly written folders are removed."""
    sys.exit(128 + number)
