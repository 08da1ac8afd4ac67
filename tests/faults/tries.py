"""Kill work, or let its operations on files fail, then go on as its messages say, and count what comes of it."""

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from injector import ERRORS, KILL, Outcome, Server
from kinds import Kind

_MOST_STARTS = 4
# After these messages the folder must be removed before a new start, as they say themselves.
_ADVICE = "remove the folder and start again"
# Numbers, the random parts of names that are made beside a file or folder, and the parameters whose optimizer states have a folder.
_VARYING = re.compile(r"(?<=/zero/)[^/]+|\.tmp\w+|\.finetune-\w+|\.[0-9a-f]{8}\.|\d+")


@dataclass
class Tally:
    """The counts of one kind and one fault: how often it was injected, and what went wrong, with an example each.

    `repeated` counts requests that were answered again because their answer was on its way at a kill.
    """

    kind: str
    fault: str
    operations: int = 0
    tries: int = 0
    stopped: int = 0
    same: int = 0
    repeated: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    minutes: float = 0.0

    def note(self, name: str, at: int, text: str) -> None:
        """Count something that must not happen."""
        self.faults[name] += 1
        self.examples.append(f"{self.kind}, {self.fault} at {at}: {name}\n{text[-1500:]}")


def kill_everywhere(server: Server, kind: Kind, tries: int | None = 0) -> Tally:
    """Stop the work before operations, and from what is on the disk there go on as a person would whose process was killed.

    The work itself runs once, so this costs no more than the resumed runs. `kill_really` sends the signal.
    """
    tally, expected, log = _measure(server, kind, "kill")
    wanted = set(_choose(log, "kill", tries))
    seen: set[tuple[object, ...]] = set()
    kind.clear()
    for at in server.walk(kind.start, kind.output.parent):
        if at not in wanted:
            continue
        tally.tries += 1
        tally.stopped += 1
        if (state := _look_at(kind.output.parent)) in seen:
            tally.same += 1
            continue
        seen.add(state)
        with _put_copy(kind.output.parent):
            killed = Outcome(-9, at, "", 0)
            _check(kind, tally, at, _go_on(server, kind, killed), expected)
    return tally


def _look_at(folder: Path) -> tuple[object, ...]:
    """Return what tells one state of a folder from another: every file, its size, and when it was written."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode))
    return tuple(found)


@contextlib.contextmanager
def _put_copy(folder: Path) -> Iterator[None]:
    """Put a copy in the place of a folder within the block; the stopped process keeps the files that it has opened."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    shutil.copytree(aside, folder, symlinks=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        aside.rename(folder)


def kill_really(server: Server, kind: Kind, places: Iterator[int]) -> Tally:
    """Kill the work at operations, go on as a person would, and compare what comes out with the uninterrupted work."""
    tally, expected, _ = _measure(server, kind, "kill")
    for at in places:
        kind.clear()
        tally.tries += 1
        outcome = server.run(kind.start, kind.output.parent, at, KILL)
        tally.stopped += outcome.status != 0
        _check(kind, tally, at, _go_on(server, kind, outcome), expected)
    return tally


def fail_everywhere(
    server: Server, kind: Kind, error: str, places: Iterator[int] | None = None, tries: int | None = 0
) -> Tally:
    """Let an operation fail; the work must end well or in one message, and go on once the cause is gone."""
    tally, expected, log = _measure(server, kind, error)
    for at in places if places is not None else _choose(log, error, tries):
        kind.clear()
        tally.tries += 1
        outcome = server.run(kind.start, kind.output.parent, at, ERRORS[error])
        tally.stopped += outcome.status != 0
        if outcome.has_traceback:
            tally.note("traceback", at, outcome.text)
        elif outcome.status not in (0, 2):
            tally.note(f"status {outcome.status}", at, outcome.text)
        _check(kind, tally, at, _go_on(server, kind, outcome), expected)
    return tally


def spread(operations: int, tries: int) -> list[int]:
    """Return places that are spread evenly over all operations; 0 tries are one at every operation."""
    if not tries or tries >= operations:
        return list(range(1, operations + 1))
    return [1 + number * operations // tries + operations // (2 * tries) for number in range(tries)]


def thin_out(log: Sequence[str], writes_only: bool) -> list[int]:
    """Return the first, the middle and the last place of equal operations; `writes_only` leaves out what cannot fail.

    Two operations are equal where the call is the same, and the paths differ in numbers and random names only: optimizer.pt of two
    checkpoints, the states of two parameters, the blocks of one file.
    """
    equal: dict[str, list[int]] = {}
    for place, line in enumerate(log, start=1):
        if line.startswith("1") or not writes_only:
            equal.setdefault(_VARYING.sub("N", line), []).append(place)
    return sorted({places[at] for places in equal.values() for at in (0, len(places) // 2, -1)})


def _measure(server: Server, kind: Kind, fault: str) -> tuple[Tally, dict[str, str], tuple[str, ...]]:
    kind.clear()
    whole = server.run(kind.start, kind.output.parent)
    assert whole.status == 0, whole.text
    return Tally(kind.name, fault, whole.operations), kind.hash_results(), whole.log


def _choose(log: tuple[str, ...], fault: str, tries: int | None) -> list[int]:
    """Return places for a fault: `tries` of them, at all operations (0), or at those that are not equal (None)."""
    return thin_out(log, fault != "kill") if tries is None else spread(len(log), tries)


def _go_on(server: Server, kind: Kind, outcome: Outcome) -> Outcome:
    """Go on as the messages say until the work is finished."""
    for _ in range(_MOST_STARTS):
        if outcome.status == 0 or "this run has finished" in outcome.text:
            return outcome
        if _ADVICE in outcome.text or not kind.output.exists() or not kind.resumes:
            kind.clear_output()
            outcome = server.run(kind.start, kind.output.parent)
        else:
            outcome = server.run(kind.resume, kind.output.parent)
            if "to resume (no recipe.yaml)" in outcome.text:
                kind.clear_output()
    return outcome


def _check(kind: Kind, tally: Tally, at: int, outcome: Outcome, expected: dict[str, str]) -> None:
    if outcome.has_traceback:
        tally.note("traceback when going on", at, outcome.text)
    found = kind.hash_results()
    if found != expected:
        missing = expected.keys() - found.keys()
        tally.note("lost" if missing else "another result", at, f"{sorted(missing)} {outcome.status}\n{outcome.text}")


def race(server: Server, other: Server, kind: Kind, tries: int) -> Tally:
    """Start two processes into one output; exactly one must train, and a file of the user's must stay."""
    tally, expected, _ = _measure(server, kind, "two at once")
    tally.operations = 0
    for number in range(tries):
        kind.clear()
        tally.tries += 1
        with ThreadPoolExecutor(2) as threads:
            outcomes = list(threads.map(lambda one: one.run(kind.start, kind.output.parent), (server, other)))
        tally.stopped += sum(outcome.status == 2 for outcome in outcomes)
        if sorted(outcome.status for outcome in outcomes) != [0, 2] or kind.hash_results() != expected:
            tally.note("another result", number, "\n".join(outcome.text for outcome in outcomes))
    return tally
