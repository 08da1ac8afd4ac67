"""Run a generated program against its tests, in a sandbox or not at all."""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import MachineError
from finetune.evaluation.sandbox.isolation import NAMESPACES, NO_ISOLATION, Isolation, list_sandboxes

# Until Python and the sandbox are there; a busy machine needs seconds.
_START_SECONDS = 20.0
# After a program's time is up, until its examiner has said so.
_GRACE_SECONDS = 2.0
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from finetune.evaluation.sandbox.inside import main; main()"


@dataclass(frozen=True)
class Program:
    """A program and its tests.

    `preamble` and `given` are ours and the row's; the tests may use what they define. `completion` is what a model wrote. The tests
    call the function `entry_point`, and have `seconds` in all.
    """

    preamble: str
    given: str
    completion: str
    tests: str
    entry_point: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and a short reason."""

    passed: bool
    reason: str


def choose_runner(is_unsafe: bool = False) -> Callable[[Program], Verdict]:
    """Return the function that runs programs, in a sandbox unless the user says otherwise.

    Raises:
        MachineError: this system has no sandbox.
    """
    if is_unsafe and sys.platform != "win32":
        return functools.partial(run_program, isolation=NO_ISOLATION)
    found = find_sandbox()
    if isinstance(found, str):
        raise MachineError(
            f"this task runs code that a model wrote, and this machine has no sandbox for it ({found}); on Linux, install the "
            "package bubblewrap or allow user namespaces; --unsafe-code runs the code without a sandbox, with your rights"
        )
    return functools.partial(run_program, isolation=found)


@functools.cache
def find_sandbox() -> Isolation | str:
    """Return the first sandbox in which a small program runs as it should, or why there is none."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    probe = Program("", "def probe(number):\n", "    return number + 1\n", "assert probe(1) == 2\n", "probe", 5.0)
    obstacles = []
    for isolation in list_sandboxes():
        try:
            verdict = run_program(probe, isolation)
        except MachineError as error:
            obstacles.append(f"{isolation.name}: {error}")
            continue
        if verdict.passed:
            return isolation
        obstacles.append(f"{isolation.name}: {verdict.reason}")
    return "; ".join(obstacles)


def run_program(program: Program, isolation: Isolation = NAMESPACES) -> Verdict:
    """Run a program against its tests: each side in a sandbox of its own, joined by two pipes.

    The verdict comes from the side of the tests, on a pipe that the program's side does not have.

    Raises:
        MachineError: the sandbox could not be made.
    """
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-sandbox-", ignore_cleanup_errors=True))
        pipes = _Pipes(stack)
        visible = sorted({sys.base_prefix, sys.prefix})
        python = isolation.wrap([sys.executable, "-I", "-c", _BOOT, str(Path(__file__).parents[3])], visible)
        (calls_out, calls_in), (replies_out, replies_in), (verdict_out, verdict_in) = (pipes.make() for _ in range(3))
        common = {
            "is_sandbox": isolation.is_sandbox,
            "enters_namespaces": isolation.enters_namespaces,
            "root": place,
            "visible": visible,
            "preload": ["numpy"] if "numpy" in program.preamble else [],
            "entry_point": program.entry_point,
            "seconds": program.seconds,
        }
        candidate = {
            "role": "candidate",
            "calls": calls_out,
            "replies": replies_in,
            "program": program.preamble + program.given + program.completion,
        }
        examiner = {
            "role": "examiner",
            "calls": calls_in,
            "replies": replies_out,
            "verdict": verdict_in,
            "preamble": program.preamble,
            "given": program.given,
            "tests": program.tests,
        }
        stack.enter_context(_launch(python, common | candidate, place, calls_out, replies_in))
        stack.enter_context(_launch(python, common | examiner, place, calls_in, replies_out, verdict_in))
        pipes.close(verdict_out)
        return _await_verdict(verdict_out, program.seconds)


class _Pipes:
    """Pipes whose ends are closed once each; a number that is closed may soon be another file's."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.open: set[int] = set()
        stack.callback(self.close)

    def make(self) -> tuple[int, int]:
        """Return the end to read from and the end to write to of a new pipe."""
        ends = os.pipe()
        self.open.update(ends)
        return ends

    def close(self, *kept: int) -> None:
        """Close all ends but some."""
        for end in self.open - set(kept):
            os.close(end)
        self.open &= set(kept)


@contextlib.contextmanager
def _launch(command: list[str], settings: dict[str, Any], place: str, *descriptors: int) -> Iterator[None]:
    """Start one side in a process group of its own; kill the whole group at the end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=place,
        env={"OPENBLAS_NUM_THREADS": "1"},
        pass_fds=descriptors,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_verdict(descriptor: int, seconds: float) -> Verdict:
    """Read what the examiner says; without a word in time the program counts as failed.

    Raises:
        MachineError: the sandbox could not be made.
    """
    buffer, deadline, has_started = b"", time.monotonic() + _START_SECONDS, False
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            break
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        *lines, buffer = (buffer + part).split(b"\n")
        for message in map(json.loads, lines):
            if "broken" in message:
                raise MachineError(message["broken"])
            if "passed" in message:
                return Verdict(message["passed"] is True, str(message["reason"]))
            has_started, deadline = True, time.monotonic() + seconds + _START_SECONDS
    if not has_started:
        raise MachineError("the process that runs the tests did not start")
    return Verdict(False, "timed out")
