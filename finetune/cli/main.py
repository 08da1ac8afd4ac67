"""What each verb does: call one function and print. The only place that prints or exits; `command_line.py` parses."""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from finetune.cli.doing import run_chat, run_demo, run_evaluate, run_export, run_fold, run_train
from finetune.cli.libraries import is_main_process, quiet_libraries
from finetune.cli.looking import (
    run_check,
    run_checkpoints,
    run_doctor,
    run_lint,
    run_mixtures,
    run_plan,
    run_preview,
)
from finetune.cli.parser import Verb, make_parser
from finetune.cli.printing import INTERRUPTED, SUCCESS, USER_ERROR
from finetune.errors import FinetuneError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 fine, 2 the user's input, 1 our bug (with its traceback), 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show Chinese must not end the run
    arguments = make_parser(_VERBS).parse_args(argv)
    quiet_libraries()
    signal.signal(signal.SIGTERM, _stop)
    # At the end Python would search everything that torch has loaded for garbage, a third of a second for nothing.
    atexit.register(gc.freeze)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except FinetuneError as error:
        if is_main_process():
            print(f"finetune {arguments.verb}: {error}", file=sys.stderr)
        status = USER_ERROR
    except KeyboardInterrupt:
        print(f"finetune {arguments.verb}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = SUCCESS
    sys.exit(status)


def _stop(number: int, frame: FrameType | None) -> None:
    """End as after an error, so that what is half-written is removed."""
    sys.exit(128 + number)


_VERBS: Mapping[str, Verb] = {
    "checkpoints": run_checkpoints,
    "mixtures": run_mixtures,
    "fold": run_fold,
    "check": run_check,
    "preview": run_preview,
    "lint": run_lint,
    "plan": run_plan,
    "doctor": run_doctor,
    "train": run_train,
    "export": run_export,
    "evaluate": run_evaluate,
    "chat": run_chat,
    "demo": run_demo,
}
