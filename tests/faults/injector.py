"""Run command lines of the kit in child processes that are killed, meet an error, or are stopped at the n-th operation on files.

The layer in `layer.c` is compiled with the system's C compiler and loaded by LD_PRELOAD into this program, which imports everything
once and then forks. It is started by `Server`; `serve` is what runs in it.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KILL = 0
_STOP = -1
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
_MOST_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What a command line did: its exit status (negative: killed by that signal), its operations, its output, its seconds, its memory.

    `log` names every operation of an undisturbed run, with 1 before what can fail: "1 write /path/to/file".
    """

    status: int
    operations: int
    text: str
    seconds: float
    peak_bytes: int = 0
    log: tuple[str, ...] = ()

    @property
    def has_traceback(self) -> bool:
        """Whether it ended in a bug rather than in a message."""
        return self.status == 1 or "Traceback (most recent call last)" in self.text


def can_inject() -> bool:
    """Tell whether this system has what the layer needs: Linux and a C compiler."""
    return sys.platform == "linux" and shutil.which("cc") is not None


class Server:
    """A process with the layer, in which command lines are run."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        layer = folder / "layer.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(layer), str(HERE / "layer.c"), "-ldl"], check=True)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "injector.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **(environment or {}),
                "LD_PRELOAD": str(layer),
                "FAULT_LAYER": str(layer),
                "OMP_NUM_THREADS": "1",
            },
        )
        assert self._process.stdout is not None and self._process.stdin is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def process_id(self) -> int:
        """The process whose only child is the command line that runs."""
        return self._process.pid

    def run(self, arguments: list[str], root: Path, at: int = -1, number: int = KILL) -> Outcome:
        """Run one command line; operations below `root` count, and the one with the number `at` is the last or fails."""
        return Outcome(**self._ask([arguments, str(root), at, number]))

    def walk(self, arguments: list[str], root: Path) -> Iterator[int]:
        """Run one command line and yield the number of every operation below `root`, while the process stands still before it."""
        answer = self._ask([arguments, str(root), 1, _STOP])
        number = 0
        while answer is None:
            number += 1
            yield number
            answer = self._ask(None)
        assert answer["status"] == 0, answer["text"]

    def _ask(self, request: Any) -> Any:
        print(json.dumps(request), file=self._input, flush=True)
        return json.loads(self._output.readline())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._input.close()
        self._process.wait()
        self._output.close()


def serve() -> None:
    """Read requests, run each in a child, and answer with its outcome."""
    import finetune.exporting.verify
    import finetune.pipeline.chain  # everything is imported before the first child is made  # noqa: F401
    from finetune.cli.main import main

    layer = ctypes.CDLL(os.environ["FAULT_LAYER"])
    layer.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    layer.fault_count.restype = ctypes.c_long
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    walk: Iterator[Outcome | None] = iter(())
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            outcome = next(walk)
        else:
            work = _run_child(main, layer, *request)
            outcome = next(work)
            walk = work if outcome is None else walk
        print(json.dumps(outcome and asdict(outcome)), file=answers, flush=True)


def _run_child(main, layer, arguments, root, at, number) -> Iterator[Outcome | None]:
    """Run a command line in a child; yield None whenever it is stopped, and its outcome at the end."""
    started = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as log,
        tempfile.TemporaryFile("w+") as counts,
        tempfile.TemporaryFile("w+") as names,
        Path(os.devnull).open() as nothing,
    ):
        known = set(sys.modules)
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdin = nothing
            layer.fault_arm(root.encode(), at, number)
            layer.fault_log(names.fileno() if at < 0 else -1)
            status = 1
            try:
                status = _run_line(main, arguments)
            finally:
                with contextlib.suppress(Exception):
                    layer.fault_arm(b"", -1, KILL) if number == _STOP else None
                    sys.stderr.flush()
                    json.dump([layer.fault_count(), [name for name in sys.modules if name not in known]], counts)
                    counts.flush()
                os._exit(status)
        while (ended := _wait(child)) is None:
            yield None
            os.kill(child, signal.SIGCONT)
        status, peak_bytes = ended
        for file in (log, counts, names):
            file.seek(0)
        operations, modules = json.loads(counts.read() or "[0, []]")
        _import_all(modules)
        seconds = round(time.monotonic() - started, 2)
        yield Outcome(status, operations, log.read()[-4000:], seconds, peak_bytes, tuple(names.read().splitlines()))


def _import_all(modules: list[str]) -> None:
    """Import what a child had to import, so that the next one finds it, and take all of it out of the garbage collector's sight."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if modules:
        gc.collect()
        gc.freeze()


def _run_line(main, arguments) -> int:
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(child: int) -> tuple[int, int] | None:
    """Return the exit status and the peak memory of a child, or None where it was stopped; one that hangs is killed."""
    deadline = time.monotonic() + _MOST_SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG | os.WUNTRACED)
        if done:
            return None if os.WIFSTOPPED(status) else (os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return -1000, 0
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
