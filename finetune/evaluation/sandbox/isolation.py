"""The ways to shut a process in: by namespaces of our own, by bubblewrap, or not at all."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.evaluation.sandbox.namespaces import DEVICES, SYSTEM_PATHS

_BUBBLEWRAP = (
    *(
        "--unshare-all",
        "--unshare-user",
        "--uid",
        "1000",
        "--gid",
        "1000",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--clearenv",
    ),
    *("--setenv", "OPENBLAS_NUM_THREADS", "1"),
)
_TEMPORARY_BYTES = 64 << 20


@dataclass(frozen=True)
class Isolation:
    """A way to shut a process in.

    `wrap` takes a command and the folders that it must see, and returns the command to start. `is_sandbox` says whether the process
    is shut in, `enters_namespaces` whether it does so itself after its start.
    """

    name: str
    wrap: Callable[[Sequence[str], Sequence[str]], list[str]]
    is_sandbox: bool
    enters_namespaces: bool


def _keep(command: Sequence[str], visible: Sequence[str]) -> list[str]:
    return list(command)


def _wrap_in_bubblewrap(command: Sequence[str], visible: Sequence[str]) -> list[str]:
    options = [shutil.which("bwrap") or "bwrap", *_BUBBLEWRAP]
    package = str(Path(__file__).parents[2])
    for path in (*SYSTEM_PATHS, *visible, package):
        if Path(path).is_symlink():
            options += ["--symlink", os.readlink(path), path]  # noqa: PTH115
        else:
            options += ["--ro-bind-try", path, path]
    for device in DEVICES:
        options += ["--dev-bind-try", device, device]
    options += ["--size", str(_TEMPORARY_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*options, "--", *command]


NAMESPACES = Isolation("user namespaces", _keep, is_sandbox=True, enters_namespaces=True)
BUBBLEWRAP = Isolation("bubblewrap", _wrap_in_bubblewrap, is_sandbox=True, enters_namespaces=False)
NO_ISOLATION = Isolation("none", _keep, is_sandbox=False, enters_namespaces=False)


def list_sandboxes() -> list[Isolation]:
    """Return the sandboxes that this system may have, the one to try first before the others."""
    return [NAMESPACES, *([BUBBLEWRAP] if shutil.which("bwrap") else [])]
