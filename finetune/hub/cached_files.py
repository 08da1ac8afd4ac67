"""Compare files of the hub's cache with their names: a blob is named by the hash of its content.

Source: huggingface_hub, "Understand caching"; git-scm.com, "Git Objects" (a blob's SHA-1 is that of `blob SIZE`, a zero byte and
the content).
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from finetune.errors import HubError
from finetune.files.cache import hash_file

_BLOBS = "blobs"
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def check_cached_files(files: Iterable[Path]) -> None:
    """Compare each file that is a link into the hub's cache with the hash in its blob's name, once a process.

    Raises:
        HubError: one has other content.
    """
    for file in files:
        if file.is_symlink():
            blob = file.parent / file.readlink()
            status = blob.stat()
            if blob.parent.name == _BLOBS and not _is_whole(blob, status.st_size, status.st_mtime_ns):
                raise HubError(
                    f"{file}: does not hold what the hub sent: its content has another hash than the one that names it, so it was "
                    f"damaged on the way or on this disk; remove {blob.resolve()}, and run the same command again, which fetches it anew"
                )


@functools.lru_cache(maxsize=1024)
def _is_whole(blob: Path, size: int, changed: int) -> bool:
    """Tell whether a blob's content has the hash in its name; a name that is no hash says nothing."""
    if _SHA256.fullmatch(blob.name):
        return hash_file(blob) == blob.name
    if _GIT_SHA1.fullmatch(blob.name):
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        digest.update(blob.read_bytes())
        return digest.hexdigest() == blob.name
    return True
