"""Inject faults into all kinds of work, and write what came of it as a table: `make faults`.

    python tests/faults/faults.py --report docs/reliability.md

`--tries 20` takes twenty places of each kind, `--kinds lora,fold` some kinds. A whole pass takes hours.
"""

import argparse
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flips import flip_places
from injector import ERRORS, KILL, Outcome, Server
from kinds import Kind, make_export, make_kinds

_MOST_STARTS = 4
# After these messages the folder must be removed before a new start, as they say themselves.
_ADVICE = "remove the folder and start again"


@dataclass
class Tally:
    """The counts of one kind and one fault: how often it was injected, and what went wrong, with an example each."""

    kind: str
    fault: str
    operations: int = 0
    tries: int = 0
    stopped: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, name: str, at: int, text: str) -> None:
        """Count something that must not happen."""
        self.faults[name] += 1
        self.examples.append(f"{self.kind}, {self.fault} at {at}: {name}\n{text[-1500:]}")


def kill_everywhere(server: Server, kind: Kind, places: Iterator[int] | None = None, tries: int = 0) -> Tally:
    """Kill the work at operations, go on as a person would, and compare what comes out with the uninterrupted work."""
    tally, expected = _measure(server, kind, "kill")
    for at in places if places is not None else _spread(tally.operations, tries):
        kind.clear()
        tally.tries += 1
        outcome = server.run(kind.start, kind.output.parent, at, KILL)
        tally.stopped += outcome.status != 0
        _check(kind, tally, at, _go_on(server, kind, outcome), expected)
    return tally


def fail_everywhere(
    server: Server, kind: Kind, error: str, places: Iterator[int] | None = None, tries: int = 0
) -> Tally:
    """Let an operation fail; the work must end well or in one message, and go on once the cause is gone."""
    tally, expected = _measure(server, kind, error)
    for at in places if places is not None else _spread(tally.operations, tries):
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


def _spread(operations: int, tries: int) -> list[int]:
    """Return places that are spread evenly over all operations; 0 tries are one at every operation."""
    if not tries or tries >= operations:
        return list(range(1, operations + 1))
    return [1 + number * operations // tries + operations // (2 * tries) for number in range(tries)]


def _measure(server: Server, kind: Kind, fault: str) -> tuple[Tally, dict[str, str]]:
    kind.clear()
    whole = server.run(kind.start, kind.output.parent)
    assert whole.status == 0, whole.text
    return Tally(kind.name, fault, whole.operations, seconds=whole.seconds), kind.hash_results()


def _go_on(server: Server, kind: Kind, outcome: Outcome) -> Outcome:
    """Go on as the messages say until the work is finished."""
    for _ in range(_MOST_STARTS):
        if outcome.status == 0 or "this run has finished" in outcome.text:
            return outcome
        if _ADVICE in outcome.text or not kind.output.exists() or not kind.resumes:
            kind.clear()
            outcome = server.run(kind.start, kind.output.parent)
        else:
            outcome = server.run(kind.resume, kind.output.parent)
            if "to resume (no recipe.yaml)" in outcome.text:
                kind.clear()
    return outcome


def _check(kind: Kind, tally: Tally, at: int, outcome: Outcome, expected: dict[str, str]) -> None:
    if outcome.has_traceback:
        tally.note("traceback when going on", at, outcome.text)
    found = kind.hash_results()
    if found != expected:
        missing = expected.keys() - found.keys()
        tally.note("lost" if missing else "another result", at, f"{sorted(missing)} {outcome.status}\n{outcome.text}")


def flip_everywhere(server: Server, kind: Kind, cache: Path, tries: int) -> list[Tally]:
    """Flip single bits in cached rows, folds and `nano`, in checkpoints and in adapters."""
    tallies: dict[str, Tally] = {}

    def note(name: str, place: str, text: str) -> None:
        wrong.setdefault(name, []).append((place, text))

    wrong: dict[str, list[tuple[str, str]]] = {}
    folders = {f"cached {name}": cache / name for name in ("rows", "folds", "nano")}
    for name, count in flip_places(server, kind, folders, tries, note).items():
        tallies[name] = Tally(name, "one bit", tries=count)
        for place, text in wrong.get(name, ()):
            tallies[name].note("another result", 0, f"{place}\n{text}")
    return list(tallies.values())


def race(server: Server, other: Server, kind: Kind, tries: int) -> Tally:
    """Start two processes into one output; exactly one must train, and a file of the user's must stay."""
    tally, expected = _measure(server, kind, "two at once")
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


def render(tallies: list[Tally], tries: int, seconds: float) -> str:
    """Return the table as the page of the documentation."""
    lines = [
        "# What happens when something fails",
        "",
        "This page is written by `make faults`. A layer between the program and the C library kills the process, or lets one call",
        "fail, at the n-th operation on files (open, write, rename, sync, remove), also within the libraries in Rust and C++. A write",
        "that is killed has written half. Then the work is resumed as its messages say, until it has ended.",
        "",
        f"{f'{tries} places of each kind, spread evenly' if tries else 'Every operation'}, on `nano`, {platform.system()}, Python {platform.python_version()};",
        f"{sum(tally.tries for tally in tallies):,} faults in {seconds / 60:.0f} minutes. One bit is flipped at places chosen by a seed.",
        "",
        "| work | fault | operations | tried | stopped | another result | lost | tracebacks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tally in tallies:
        tracebacks = sum(count for name, count in tally.faults.items() if "traceback" in name or "status" in name)
        lines.append(
            f"| {tally.kind} | {tally.fault} | {tally.operations or ''} | {tally.tries} | {tally.stopped} | {tally.faults['another result']} "
            f"| {tally.faults['lost']} | {tracebacks} |"
        )
    return "\n".join([*lines, "", _NOTES])


_NOTES = """*stopped*: the fault ended the work; else it met something that the work can do without. *another result*: the weights differ
from those of the uninterrupted work in any bit. *lost*: there is no result in the end. *tracebacks*: the work ended in anything but
success or one message.

## What the kit does

- **A run goes on exactly where it was, or says why it cannot.** Each checkpoint has a `manifest.json` with the sizes and hashes of
  its files, written last. `--resume` takes the newest checkpoint that fits its manifest, and names those that do not. A run that was
  stopped after its last step trains no step more. A run that was moved goes on in its new folder.
- **A run stops at the first number that is none.** Losses, gradient norms and held-out losses are looked at in every step, before the
  optimizer uses them; checkpoints and results with NaN or infinite weights are never taken for whole, and never exported.
- **Caches are compared with their hashes** once a process, and made again where they differ; a line says so. `finetune doctor` lists
  the damaged ones. Several processes that need the same folder wait for the one that makes it. A cache that cannot be written is
  gone without.
- **One process writes a run.** `.lock` in the run directory names its owner, host and time. The lock of a dead process is taken
  over; that of another host is not, since nobody here can see whether it runs: remove it by hand.
- **Base models are checked by their headers** before a library loads them: transformers would fill a missing tensor with random
  numbers.
- **Nothing of a checkpoint runs code or leads out of its folder**: no pickles, no remote code, no links out of the folder beside
  weights. What is printed is escaped.
- **A full disk** ends the work with one message; what was saved before stays whole.
"""


def main() -> None:
    """Run all kinds and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tries", type=int, default=0, help="faults of each kind, spread evenly; 0 for every operation"
    )
    parser.add_argument("--kinds", default="lora,nf4,full,dpo,pretrain,chain,fold,export")
    parser.add_argument("--faults", default="kill,ENOSPC,EIO,EACCES")
    parser.add_argument("--flips", type=int, default=200, help="bits to flip in each kind of file")
    parser.add_argument("--races", type=int, default=50, help="starts of two processes into one output")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    started, tallies = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        makers = make_kinds(work)
        with Server(work) as server:
            for name in filter(None, arguments.kinds.split(",")):
                kind = _make(server, makers, work, name)
                for fault in arguments.faults.split(","):
                    run = (
                        kill_everywhere
                        if fault == "kill"
                        else lambda *a, fault=fault, **o: fail_everywhere(*a, fault, **o)
                    )
                    tally = run(server, kind, tries=arguments.tries)
                    tallies.append(tally)
                    print(
                        f"{name} {fault}: {tally.tries} tries, {tally.stopped} stopped, {dict(tally.faults) or 'all as it should be'}",
                        flush=True,
                    )
                    print("\n".join(tally.examples), flush=True)
                _report(arguments, tallies, started)
            tallies += _try_the_rest(server, makers, work, arguments)
    _report(arguments, tallies, started)


def _report(arguments: argparse.Namespace, tallies: list[Tally], started: float) -> None:
    """Write the page with what was tried so far."""
    if arguments.report:
        text = render(tallies, arguments.tries, time.monotonic() - started)
        arguments.report.write_text(text, encoding="utf-8")


def _try_the_rest(server: Server, makers, work: Path, arguments: argparse.Namespace) -> list[Tally]:
    tallies: list[Tally] = []
    cache = work / "cache"
    if arguments.flips:
        with Server(work, {"FINETUNE_CACHE": str(cache)}) as own:
            tallies += flip_everywhere(own, makers["lora"](), cache, arguments.flips)
    if arguments.races:
        with Server(work) as other:
            tallies.append(race(server, other, makers["lora"](), arguments.races))
    for tally in tallies:
        print(
            f"{tally.kind} {tally.fault}: {tally.tries} tries, {dict(tally.faults) or 'all as it should be'}",
            flush=True,
        )
        print("\n".join(tally.examples), flush=True)
    return tallies


def _make(server: Server, makers, work: Path, name: str) -> Kind:
    if name != "export":
        return makers[name]()
    run = makers["lora"]()
    run.clear()
    assert server.run(run.start, run.output.parent).status == 0
    return make_export(work, run.output)


if __name__ == "__main__":
    main()
