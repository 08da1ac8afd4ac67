"""The environment variables of this process: what `accelerate launch` or torchrun tells by them, and changing them for a while.

Never imports torch.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

from finetune.errors import MachineError

# What the two launchers set, by the beginnings of the names.
_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")
_NAMES = frozenset(
    [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
)


def count_processes() -> int:
    """Return the number of processes of this launch over all machines; 1 without a launcher.

    Raises:
        MachineError: `WORLD_SIZE` is no number above 0.
    """
    return max(_read_number("WORLD_SIZE", 1), 1)


def read_rank() -> int:
    """Return the number of this process over all machines, from 0.

    Raises:
        MachineError: `RANK` is no number.
    """
    return _read_number("RANK", 0) if is_launched() else 0


def read_local_rank() -> int:
    """Return the number of this process on its machine, from 0, which is the number of its GPU.

    Raises:
        MachineError: `LOCAL_RANK` is no number.
    """
    return _read_number("LOCAL_RANK", 0)


def is_launched() -> bool:
    """Return whether this is one of several processes of a launch."""
    return count_processes() > 1


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes. A variable `RANK` alone, without a launch, changes nothing."""
    return read_rank() == 0


def _read_number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise MachineError(f"{name}: must be a number, as a launcher sets it; found {text!r}; unset this variable")
    return int(text) if text else default


@contextlib.contextmanager
def add_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside this context; one that a person has set stays as it is."""
    added = {name: text for name, text in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def hide_launcher() -> Iterator[None]:
    """Hide the launcher's variables inside this context, so that libraries take this process for the only one."""
    hidden = {name: text for name, text in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def hide_script() -> Iterator[None]:
    """Let processes that are spawned inside this context not run the script of this one, as they do under the name `__mp_main__`.

    A person's script without `if __name__ == "__main__"` would train there a second time.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
