"""Remember which commit each name of the hub stands for: within a process a branch that moves stays what it was first."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping

from finetune.hub.faults import Asked

_COMMIT = re.compile(r"[0-9a-f]{40}")
_known: dict[Asked, str] = {}


def find_commit(asked: Asked) -> str | None:
    """Return the commit that a name stands for: itself where it names one, or the one that was found or pinned before."""
    if asked.revision is not None and _COMMIT.fullmatch(asked.revision):
        return asked.revision
    return _known.get(asked)


def remember_commit(asked: Asked, commit: str) -> None:
    """Keep the commit that a name stands for."""
    _known[asked] = commit


def record_commits(names: Iterable[Asked]) -> list[dict[str, str | None]]:
    """Return the commits of those names that have one, in the form that `pin_commits` reads."""
    found = ((asked, find_commit(asked)) for asked in dict.fromkeys(names))
    return [
        {"kind": asked.kind, "repository": asked.repository, "revision": asked.revision, "commit": commit}
        for asked, commit in found
        if commit is not None
    ]


@contextlib.contextmanager
def pin_commits(record: Iterable[Mapping[str, str | None]]) -> Iterator[None]:
    """Let names stand for recorded commits within the block, so that a run goes on with what it began with."""
    before = dict(_known)
    for entry in record:
        kind, repository, commit = entry.get("kind"), entry.get("repository"), entry.get("commit")
        if kind in ("model", "dataset") and repository and commit:
            _known[Asked(repository, entry.get("revision"), kind)] = commit  # type: ignore[arg-type]
    try:
        yield
    finally:
        _known.clear()
        _known.update(before)
