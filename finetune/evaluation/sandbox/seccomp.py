"""Forbid system calls that a program under test has no use for, and that would lead around its limits."""

import ctypes
import errno
import os
import platform
import struct

# Source: the tables of system calls of Linux (x86_64; arm64 has the generic table).
_CALLS: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "ptrace": 101, "mount": 165, "chroot": 161, "add_key": 248, "request_key": 249, "keyctl": 250,
            "unshare": 272, "perf_event_open": 298, "setns": 308, "memfd_create": 319, "bpf": 321, "userfaultfd": 323,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "ptrace": 117, "mount": 40, "chroot": 51, "add_key": 217, "request_key": 218, "keyctl": 219,
            "unshare": 97, "perf_event_open": 241, "setns": 268, "memfd_create": 279, "bpf": 280, "userfaultfd": 282,
        },
    ),
}  # fmt: skip
# These have the same number everywhere. Programs fall back to clone where clone3 does not exist.
_NEW_CALLS = {"io_uring_setup": 425, "clone3": 435}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_CLONE_NEW_ANY, _X32 = 0x7E020000, 0x40000000
_SET_SECCOMP, _FILTER = 22, 2


def forbid_calls() -> None:
    """Forbid the calls for this process and its children; a processor that the table lacks is left without.

    Raises:
        OSError: the kernel refuses the filter.
    """
    if platform.machine() not in _CALLS:
        return
    code = _make_filter(*_CALLS[platform.machine()])
    library = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(b"".join(code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    if library.prctl(_SET_SECCOMP, _FILTER, header, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _make_filter(architecture: int, calls: dict[str, int]) -> list[bytes]:
    """Return the instructions of the filter, in the form of the kernel's `sock_filter`."""
    code = [
        _instruct(_LOAD, _ARCHITECTURE_OFFSET),
        _instruct(_EQUAL, architecture, 1, 0),
        _instruct(_RETURN, _KILL),
        _instruct(_LOAD, _NUMBER_OFFSET),
        _instruct(_AT_LEAST, _X32, 0, 1),
        _instruct(_RETURN, _KILL),
        _instruct(_EQUAL, _NEW_CALLS["clone3"], 0, 1),
        _instruct(_RETURN, _FAIL | errno.ENOSYS),
    ]
    forbidden = [number for name, number in calls.items() if name != "clone"] + [_NEW_CALLS["io_uring_setup"]]
    for number in forbidden:
        code += [_instruct(_EQUAL, number, 0, 1), _instruct(_RETURN, _FAIL | errno.EPERM)]
    code += [
        _instruct(_EQUAL, calls["clone"], 0, 3),
        _instruct(_LOAD, _FIRST_ARGUMENT_OFFSET),
        _instruct(_ANY_BIT, _CLONE_NEW_ANY, 0, 1),
        _instruct(_RETURN, _FAIL | errno.EPERM),
        _instruct(_RETURN, _ALLOW),
    ]
    return code


def _instruct(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)
