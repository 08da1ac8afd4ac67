"""What runs inside a sandbox: the program under test on one side, its tests on the other.

The tests run in a process of their own. It calls the program's function by messages and compares what comes back, so the program
never sees the tests, and nothing that it prints, patches or returns early can count as passing.
"""

import builtins
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import IO, Any

from finetune.evaluation.sandbox.exchange import pack, receive, send, unpack
from finetune.evaluation.sandbox.namespaces import drop_rights, end_with_parent, enter_empty_root, enter_namespaces
from finetune.evaluation.sandbox.seccomp import forbid_calls

_MEGABYTE = 1 << 20
_MEMORY_BYTES, _FILE_BYTES, _PROCESSES, _FILES = 768 * _MEGABYTE, 16 * _MEGABYTE, 16, 64
_SPARE_SECONDS = 2
_MOST_REASON = 200


class _TimeOut(BaseException):
    """The time of a program is up; no `except Exception` of a test may catch it."""


def main() -> None:
    """Read the settings from standard input, shut this process in, and play its role."""
    settings = json.loads(sys.stdin.buffer.readline())
    end_with_parent()
    for name in settings["preload"]:
        importlib.import_module(name)  # not part of the program's time, as it is not in the protocols' own programs
    if not settings["enters_namespaces"]:
        _start(settings, None)
        return
    user = enter_namespaces()
    child = os.fork()  # the first process of the new namespace: when it ends, all others in there do
    if child == 0:
        try:
            enter_empty_root(settings["root"], settings["visible"])
        except OSError as error:
            _leave(f"the sandbox cannot be made: {error}", settings)
        _start(settings, user)
    os.waitpid(child, 0)


def _start(settings: dict[str, Any], user: int | None) -> None:
    os.environ.clear()
    _limit(settings["seconds"])
    if settings["is_sandbox"]:
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()  # or a signal to its own group would reach the process outside
        drop_rights(user)
        forbid_calls()
    silence = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    role = _examine if settings["role"] == "examiner" else _serve
    role(settings)
    os._exit(0)


def _limit(seconds: float) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(seconds) + _SPARE_SECONDS),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on addresses
            resource.setrlimit(kind, (most, most))
    sys.set_int_max_str_digits(0)


def _leave(reason: str, settings: dict[str, Any]) -> None:
    """Say why the sandbox could not be made, where the parent can hear it, and end."""
    if settings["role"] == "examiner":
        with open(settings["verdict"], "wb") as stream:  # noqa: PTH123
            send(stream, {"broken": reason})
    os._exit(1)


def _serve(settings: dict[str, Any]) -> None:
    """Run the program under test, and call its function as often as the tests ask for."""
    calls, replies = os.fdopen(settings["calls"], "rb"), os.fdopen(settings["replies"], "wb")
    receive(calls)  # the examiner is ready, and its clock runs
    names: dict[str, Any] = {}
    try:
        exec(settings["program"], names)
        send(replies, {"ready": True})
    except BaseException as error:
        send(replies, {"failed": _describe(error)})
        return
    while True:
        message = receive(calls)
        send(replies, _answer(names, settings["entry_point"], message))


def _answer(names: dict[str, Any], entry_point: str, message: dict[str, Any]) -> dict[str, Any]:
    values = [unpack(value) for value in message["values"]]
    named = {name: unpack(value) for name, value in message["named"].items()}
    try:
        result = pack(names[entry_point](*values, **named))
        return {"result": result, "values": [pack(value) for value in values]}
    except BaseException as error:
        return {"raised": type(error).__name__, "text": _describe(error)}


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MOST_REASON]
    except BaseException:
        return "an error that cannot be described"


def _examine(settings: dict[str, Any]) -> None:
    """Run the tests, with the program's function at the other end of a pipe, and send the verdict to the parent."""
    verdict = os.fdopen(settings["verdict"], "wb")
    calls, replies = os.fdopen(settings["calls"], "wb"), os.fdopen(settings["replies"], "rb")
    send(verdict, {"started": True})

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeOut

    signal.signal(signal.SIGALRM, stop)
    try:
        names = _run_given(settings)
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        send(calls, {"begin": True})
        reply = receive(replies)
        if reply.get("ready") is not True:
            raise RuntimeError(str(reply.get("failed")))
        names[settings["entry_point"]] = _make_caller(calls, replies)
        exec(settings["tests"], names)
        found = {"passed": True, "reason": "passed"}
    except _TimeOut:
        found = {"passed": False, "reason": "timed out"}
    except BaseException as error:
        found = {"passed": False, "reason": f"failed: {_describe(error)}"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(verdict, found)


def _run_given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the names that the given part of the program defines, such as imports and helpers that tests use."""
    for text in (settings["given"], f"{settings['given']}\n    pass\n"):
        names: dict[str, Any] = {}
        try:
            exec(settings["preamble"] + text, names)
            return names
        except SyntaxError:
            continue
    return {}


def _make_caller(calls: IO[bytes], replies: IO[bytes]) -> Callable[..., Any]:
    """Return a function that has the program's function called in the other process."""

    def call(*values: Any, **named: Any) -> Any:
        send(
            calls,
            {
                "values": [pack(value) for value in values],
                "named": {name: pack(value) for name, value in named.items()},
            },
        )
        reply = receive(replies)
        if "raised" in reply:
            raise _choose_error(reply["raised"])(str(reply.get("text")))
        for value, packed in zip(values, reply["values"], strict=True):
            _take_changes(value, unpack(packed))
        return unpack(reply["result"])

    return call


def _choose_error(name: Any) -> type[Exception]:
    """Return the built-in exception of a name; what would end the tests early becomes a plain error."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError


def _take_changes(value: Any, changed: Any) -> None:
    """Give a list, dict or set of the tests what the function made of it."""
    if type(value) is not type(changed):
        return
    if isinstance(value, list):
        value[:] = changed
    elif isinstance(value, dict | set):
        value.clear()
        value.update(changed)
