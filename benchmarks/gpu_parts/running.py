"""Run the parts of a measurement, each in processes of its own with a time limit, and save what they found again and again."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

Command = tuple[str, ...]
SAVE_SECONDS = 10
# How much of what a part said is printed if it failed, and kept in any case.
PRINTED_LINES, KEPT_LINES, LINE_LENGTH = 3, 150, 300
PROGRESS_BAR = "it/s]"


@dataclass(frozen=True)
class Part:
    """A part: commands that run at the same time, the seconds after which they are stopped, and the lists that they write.

    A part that waits for its turn imports its libraries while the one before it runs, and goes on when its standard input ends.
    """

    name: str
    commands: tuple[Command, ...]
    limit: float
    writes: tuple[str, ...]
    waits: bool = False
    environment: Mapping[str, str] | None = None


@dataclass
class Running:
    """The processes of a part, and the file of what they say."""

    part: Part
    processes: list[subprocess.Popen[bytes]]
    log: IO[bytes]


@dataclass(frozen=True)
class Place:
    """Where parts run: the folder and environment of their processes, the folder of their logs, and the file of all their ends."""

    root: Path
    environment: Mapping[str, str]
    logs: Path
    summary: Path

    def start(self, part: Part) -> Running:
        """Start the processes of a part."""
        file = (self.logs / f"{part.name}.log").open("wb")
        environment = {**self.environment, **(part.environment or {})}
        processes = [
            # A session of its own, so that a part that runs out of time is stopped with all its processes.
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env=environment,
                start_new_session=True,
            )
            for command in part.commands
        ]
        return Running(part, processes, file)


def run_parts(
    parts: Sequence[Part], place: Place, end: float, save: Callable[[Part | None, dict[str, Any]], None]
) -> None:
    """Run parts one after the other until the time `end`; `save` gets each part and how it ended, and None in between."""
    running: Running | None = None
    following: Running | None = None
    place.summary.write_text("", encoding="utf-8")
    try:
        for part, after in zip_longest(parts, parts[1:]):
            running, following = following or place.start(part), None
            if after is not None and after.waits:
                following = place.start(after)
            limit = min(part.limit, end - time.monotonic())
            ended = finish(running, limit, lambda: save(None, {}))
            running = None
            said = read_end(place.logs / f"{part.name}.log")
            if ended["status"]:
                print("\n".join(f"    {line}" for line in said[-PRINTED_LINES:]), flush=True)
            with place.summary.open("a", encoding="utf-8") as file:
                file.write("\n".join([f"== {part.name}", *said, ""]))
            save(part, ended)
    finally:
        for left in (running, following):
            if left is not None:
                stop(left)


def finish(running: Running, limit: float, save: Callable[[], None]) -> dict[str, Any]:
    """Let a part measure until it ends or its time is over; return its exit status (None: out of time) and its seconds."""
    started = saved = time.monotonic()
    for process in running.processes:
        if process.stdin is not None:
            process.stdin.close()
    while any(process.poll() is None for process in running.processes) and time.monotonic() < started + limit:
        time.sleep(0.1)
        if time.monotonic() > saved + SAVE_SECONDS:
            save()
            saved = time.monotonic()
    statuses = [process.poll() for process in running.processes]
    stop(running)
    status = None if None in statuses else max(map(abs, filter(None, statuses)), default=0)
    seconds = time.monotonic() - started
    print(f"{running.part.name:8} {describe_end(status)} after {seconds:.0f} s", flush=True)
    return {"status": status, "seconds": round(seconds, 1), "measured": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}


def describe_end(status: int | None) -> str:
    """Return how a part ended, in words."""
    return "ran out of time" if status is None else f"ended with status {status}"


def read_end(log: Path) -> list[str]:
    """Return the last lines of what a part said, without progress bars, cut to a length that a person can read."""
    lines = (line.rpartition("\r")[2] for line in log.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [line[:LINE_LENGTH] for line in lines if line.strip() and PROGRESS_BAR not in line][-KEPT_LINES:]


def stop(running: Running) -> None:
    """Stop what still runs of a part, with all that it started."""
    for process in running.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    running.log.close()
