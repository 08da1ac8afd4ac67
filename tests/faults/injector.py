"""Run command lines of the kit in child processes that are killed, or meet an error, at the n-th operation on files.

The layer in `layer.c` is compiled with the system's C compiler and loaded by LD_PRELOAD into this program, which imports everything
once and then forks. It is started by `start_server`; `serve` is what runs in it.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
KILL = 0
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
_MOST_SECONDS = 300


@dataclass(frozen=True)
class Outcome:
    """What a command line did: its exit status (negative: killed by that signal), its operations, its standard error, its seconds."""

    status: int
    operations: int
    text: str
    seconds: float

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

    def run(self, arguments: list[str], root: Path, at: int = -1, number: int = KILL) -> Outcome:
        """Run one command line; operations below `root` count, and the one with the number `at` is the last or fails."""
        print(json.dumps([arguments, str(root), at, number]), file=self._input, flush=True)
        return Outcome(**json.loads(self._output.readline()))

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
    for line in sys.stdin:
        arguments, root, at, number = json.loads(line)
        print(json.dumps(asdict(_run_child(main, layer, arguments, root, at, number))), file=answers, flush=True)


def _run_child(main, layer, arguments, root, at, number) -> Outcome:
    started = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as log,
        tempfile.TemporaryFile("w+") as counts,
        Path(os.devnull).open() as nothing,
    ):
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdin = nothing
            layer.fault_arm(root.encode(), at, number)
            status = 1
            try:
                status = _run_line(main, arguments)
            finally:
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                    counts.write(str(layer.fault_count()))
                    counts.flush()
                os._exit(status)
        status = _wait(child)
        for file in (log, counts):
            file.seek(0)
        found = counts.read()
        return Outcome(status, int(found or 0), log.read()[-4000:], round(time.monotonic() - started, 2))


def _run_line(main, arguments) -> int:
    try:
        main(arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(child: int) -> int:
    """Return the exit status of a child; one that hangs is killed."""
    deadline = time.monotonic() + _MOST_SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return -1000
        time.sleep(0.02)


if __name__ == "__main__":
    serve()
