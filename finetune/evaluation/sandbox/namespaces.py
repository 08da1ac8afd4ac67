"""Shut this process into namespaces of its own: no network, no other processes, and no file system but read-only system files.

Runs in the process that will run a program, before it does; Linux only. The calls are those of the C library.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

# Source: linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h.
_NEW_USER, _NEW_OTHERS = 0x10000000, 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_SETATTR = 2, -100, 0x8000, 442
_SET_PDEATHSIG, _SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAPABILITY_VERSION, _MOST_CAPABILITIES, _SIGKILL = 0x20080522, 64, 9
SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_HIGH_ID = 0x70000000  # user ids from here on belong to nobody
_TEMPORARY = "size=64m,nr_inodes=4k,mode=1777"


def _call(name: str, *values: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    plain = [value.encode() if isinstance(value, str) else value for value in values]
    if getattr(library, name)(*plain) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def enter_namespaces() -> int | None:
    """Leave the namespaces of the parent; return the user id to take on later, or None where it is set already.

    Root needs no namespace of users, and takes on an id that nobody has. Limits on processes do not bind root's own id.

    Raises:
        OSError: the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    if user == 0 and (spare := _find_spare_id()) is not None:
        try:
            _call("unshare", _NEW_OTHERS)
            return spare
        except OSError:
            pass
    _call("unshare", _NEW_USER | _NEW_OTHERS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {user} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {group} 1")
    return None


def _find_spare_id() -> int | None:
    """Return a user id for this process alone, or None where this container has but a few."""
    wanted = _HIGH_ID + os.getpid()
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        if inside <= wanted < inside + count:
            return wanted
    return None


def enter_empty_root(root: str, visible: Iterable[str]) -> None:
    """Make a new root of read-only system files and of `visible`, with an empty `/tmp` as the only writable place; enter `/tmp`.

    Raises:
        OSError: the system does not allow it.
    """
    _call("mount", None, "/", None, _REC | _PRIVATE, None)
    _call("mount", "tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in (*SYSTEM_PATHS, *visible, *DEVICES):
        _show(path, root)
    os.mkdir(f"{root}/tmp")  # noqa: PTH102
    _call("mount", "tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, _TEMPORARY)
    os.chdir(root)
    _call("pivot_root", ".", ".")
    _call("umount2", ".", _DETACH)
    _call("mount", None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV, None)
    os.chdir("/tmp")


def _show(path: str, root: str) -> None:
    """Show a file or folder of the system at its own place below `root`, read-only."""
    place = Path(root + path)
    if not os.path.lexists(path) or os.path.lexists(place):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_symlink():
        place.symlink_to(os.readlink(path))  # noqa: PTH115
        return
    if Path(path).is_dir():
        place.mkdir()
    else:
        place.touch()
    _call("mount", path, str(place), None, _BIND | _REC, None)
    flags = _RDONLY | _NOSUID | (0 if path in DEVICES else _NODEV)
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", flags, 0, 0, 0))
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, str(place), _AT_RECURSIVE, attributes, 32)


def drop_rights(user: int | None) -> None:
    """Take on a user id, give up all capabilities for good, and end with the parent process.

    Raises:
        OSError: the system does not allow it.
    """
    for capability in range(_MOST_CAPABILITIES):
        try:
            _call("prctl", _CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:
            break  # the kernel knows no more of them
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
    _call("capset", header, ctypes.create_string_buffer(24))
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    end_with_parent()


def end_with_parent() -> None:
    """Have the system end this process when its parent ends."""
    if sys.platform == "linux":
        _call("prctl", _SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
