"""Inject faults into all kinds of work, and write what came of it as a table: `make faults`.

    PYTHONPATH=tests python tests/faults/faults.py --results faults.json --report docs/reliability.md

`--kills 20` and `--tries 20` take twenty places of each kind, `--thin` takes all that differ, `--kinds lora,fold` some kinds. Each call adds its rows to the results,
so that a long pass can be made in parts; one without kinds, flips, starts and hostile files writes the report of what is there.
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import Sources, meet_everything
from flips import flip_everywhere
from injector import Server
from kinds import Kind, find_cold_cache, make_export, make_kinds
from paid import ASKING, Asking, kill_and_finish
from scripted_server import ScriptedServer
from tries import Tally, fail_everywhere, kill_everywhere, race

KINDS = ("lora", "nf4", "full", "dpo", "pretrain", "evaluated", "chain", "export", "fold", "cold", *ASKING)
# A kill of work that asks a server takes two runs, and the server runs along; so many moments are drawn, whatever --kills says.
_KILLS_OF_PAID_WORK, _SEED = 10, 21


def main() -> None:
    """Inject the faults that were asked for, write the counts after each kind, and the report at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="places to kill each kind at; 0 for every operation")
    parser.add_argument("--tries", type=int, default=0, help="places for each error; 0 for every operation")
    parser.add_argument(
        "--thin", action="store_true", help="of equal operations take the first, the middle and the last"
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--faults", default="kill,ENOSPC,EIO,EACCES")
    parser.add_argument("--flips", type=int, default=200, help="bits to flip in each kind of file")
    parser.add_argument("--races", type=int, default=50, help="starts of two processes into one output")
    parser.add_argument("--hostile", type=int, default=1, help="0 leaves the corpus of hostile files out")
    parser.add_argument("--work", type=Path, help="where to work; a file system in memory is fastest")
    parser.add_argument("--results", type=Path, help="a JSON file to which the counts are added")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text()) if arguments.results and arguments.results.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        started = time.monotonic()
        for tally in inject(arguments, Path(folder).resolve()):
            tally.minutes = round((time.monotonic() - started) / 60, 1)
            started = time.monotonic()
            _print(tally)
            rows[f"{tally.kind}, {tally.fault}"] = {**vars(tally), "faults": dict(tally.faults)}
            if arguments.results:
                arguments.results.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if arguments.report:
        arguments.report.write_text(render(list(rows.values())), encoding="utf-8")


def inject(arguments: argparse.Namespace, work: Path) -> Iterator[Tally]:
    """Yield the counts of each kind and fault as they come; `work` is an empty folder."""
    makers = make_kinds(work)
    os.environ["FINETUNE_CACHE"] = str(work / "cache")
    with Server(work) as warm, Server(work, {"FINETUNE_CACHE": str(find_cold_cache(work))}) as cold:
        for name in filter(None, arguments.kinds.split(",")):
            if name in ASKING:
                if "kill" in arguments.faults:
                    with contextlib.closing(ScriptedServer()) as answering:
                        yield kill_and_finish(warm, Asking(name, work, answering), _SEED, _KILLS_OF_PAID_WORK)
                continue
            server = cold if name == "cold" else warm
            kind = _make(server, makers, work, name)
            for fault in filter(None, arguments.faults.split(",")):
                if fault == "kill":
                    yield kill_everywhere(server, kind, None if arguments.thin else arguments.kills)
                else:
                    yield fail_everywhere(server, kind, fault, tries=None if arguments.thin else arguments.tries)
        if arguments.flips:
            yield from flip_everywhere(warm, makers, arguments.flips)
        if arguments.hostile:
            yield from meet_everything(warm, make_sources(warm, makers, work), work)
        if arguments.races:
            with Server(work) as other:
                yield race(warm, other, makers["lora"](), arguments.races)


def make_sources(server: Server, makers, work: Path) -> Sources:
    """Make what the hostile cases are made of."""
    kinds = {name: makers[name]() for name in ("short", "pretrain", "judge")}
    for kind in kinds.values():
        kind.clear()
        outcome = server.run(kind.start, kind.output.parent)
        assert outcome.status == 0, outcome.text
    cache = Path(os.environ["FINETUNE_CACHE"])
    (native,), (llama, *_) = cache.glob("nano/*"), cache.glob("folds/*")
    return Sources(native, llama, kinds["short"], kinds["judge"].output, kinds["pretrain"])


def _make(server: Server, makers, work: Path, name: str) -> Kind:
    if name != "export":
        return makers[name]()
    run = makers["lora"]()
    run.clear()
    assert server.run(run.start, run.output.parent).status == 0
    return make_export(work, run.output)


def _print(tally: Tally) -> None:
    found = dict(tally.faults) or "all as it should be"
    again = f", {tally.repeated} requests on their way asked again" if tally.kind in ASKING else ""
    counts = f"{tally.tries} of {tally.operations}, {tally.stopped} stopped{again}"
    print(f"{tally.kind} {tally.fault}: {counts}, {found}", flush=True)
    print("\n".join(tally.examples), flush=True)


def render(rows: list[dict[str, Any]]) -> str:
    """Return the counts as the page of the documentation."""
    lines = [
        "# What happens when something fails",
        "",
        "This page is written by `make faults`. A layer between the program and the C library stops the process before an operation on",
        "files (open, write, rename, sync, remove), or lets one call fail, also within the libraries in Rust and C++. For a kill, what is",
        "on the disk at that moment, with half of what was being written, is what the next process finds; where that is the same as at the",
        "operation before, it is tried once. Then the work is resumed as its messages say, until it has ended.",
        "",
        "Where fewer places were tried than there are operations, operations that are equal were thinned out: of those with the same call,",
        "and paths that differ in numbers and random names only (the blocks of one file, the same file of two checkpoints, the states of two",
        "parameters), the first, the middle and the last were tried; a few rows have a number of places that are spread evenly. Errors are",
        "only given to calls that can fail, which does not include removing a file. `short` is `lora` with two steps and a checkpoint at each,",
        "`cold` is `lora` without a cache, `evaluated` is `lora` with evaluations, whose best checkpoint is taken, `chain` is two stages and an export.",
        "",
        f"On `nano`, {platform.system()}, Python {platform.python_version()}: {sum(row['tries'] for row in rows):,} faults in "
        f"{sum(row['minutes'] for row in rows):.0f} minutes on a machine that other work shared. Bits are flipped at places chosen by a",
        "seed.",
        "",
        "| work | fault | operations | tried | stopped | another result | lost | tracebacks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        faults = row["faults"]
        tracebacks = sum(count for name, count in faults.items() if "traceback" in name or "status" in name)
        lines.append(
            f"| {row['kind']} | {row['fault']} | {row['operations'] or ''} | {row['tries']} | {row['stopped']} "
            f"| {faults.get('another result', 0)} | {faults.get('lost', 0)} | {tracebacks} |"
        )
    notes = [f"{row['kind']}, {row['fault']}: {row['note']}" for row in rows if row.get("note")]
    return "\n".join([*lines, *(f"\n{note}" for note in notes), "", _NOTES])


_NOTES = """*stopped*: the fault ended the work (for caches: a line said that they are damaged); else it met something that the work can do
without. *another result*: the weights differ from those of the uninterrupted work in any bit. *lost*: there is no result in the end.
*tracebacks*: the work ended in anything but success or one message.

## What the kit does

- **A run goes on exactly where it was, or says why it cannot.** Each checkpoint has a `manifest.json` with the sizes and hashes of
  its files, written last. `--resume` takes the newest checkpoint that fits its manifest, and names those that do not. A run that was
  stopped after its last step trains no step more. A run or a chain that was moved goes on in its new folder, also with several
  processes, and still ends with its best weights where the recipe asks for them.
- **States have checksums of their own.** torch writes one for each part of `rng_state.pth`, `scheduler.pt` and `optimizer.pt`. They are
  compared before a run goes on (up to 1 GB a file), so damage is also found where a manifest was written anew over it. A manifest
  finds damage, not forgery: whoever changes a file, its checksums and its manifest is not found out.
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


if __name__ == "__main__":
    main()
