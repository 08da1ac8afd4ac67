"""Kill `finetune clean` with a judge and `finetune synthesize`, start them again, and count what was asked of the server twice.

A server of a script answers. Half of the kills come at operations on files, which include those of the kept answers, half while the
server handles a request: before or after its answer is on the way. An answer that was on the way at the kill is lost, as the
documentation says; whatever had been kept must not be asked for again.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from injector import KILL, Outcome, Server
from kinds import Kind
from scripted_server import ScriptedServer, reply
from tries import Tally

_ROWS, _CONCURRENCY = 24, 3
_STEPS = "unreadable: true, rules: [mojibake], exact_duplicates: true, near_duplicates: {threshold: 0.8}"
_SECTIONS = {
    "clean": f"clean: {{{_STEPS}, judge: {{endpoint: teacher, drop_lowest: 0.25}}}}",
    "synthesize": "synthesize: {endpoint: teacher, job: pairs, samples: 2, rules: {final_answer: 1.0}}",
}
ASKING = tuple(_SECTIONS)


class Asking:
    """One kind of work that asks a server, in a folder of its own that holds its cache too."""

    def __init__(self, name: str, work: Path, server: ScriptedServer) -> None:
        self.folder = work / f"asking-{name}"
        self.folder.mkdir()
        self.server, self._kill_at, self._answers_first, self._victim = server, 0, False, 0
        self._handled, self._lock = 0, threading.Lock()
        self._killed, self._last = threading.Event(), dict[str, Any]()
        server.script, server.sent = self._answer, self._after
        rows = [
            {"prompt": f"What is {n} + {n}?", "completion": f"It is #### {2 * n}. {n * 'so '}", "answer": str(2 * n)}
            for n in range(_ROWS)
        ]
        lines = [json.dumps(row) + "\n" for row in [*rows, rows[3]]]
        (self.folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(
            f"model: {{checkpoint: nano}}\ndata: {{train: {self.folder / 'rows.jsonl'}}}\n{_SECTIONS[name]}\n"
            f"endpoints: {{teacher: {{model: m, base_url: {server.url}, concurrency: {_CONCURRENCY}, retries: 0}}}}\n",
            encoding="utf-8",
        )
        output = self.folder / "out"
        self.kind = Kind(name, [name, str(recipe), "-o", str(output)], output, ("*",), resumes=False)

    def clear(self) -> None:
        """Forget everything: the output, the kept answers, and what the server was asked."""
        self.kind.clear()
        for file in find_answers().parent.glob("answers.sqlite*"):
            file.unlink()
        self.server.answered.clear()
        self._handled, self._kill_at, self._last = 0, 0, {}

    def kill_at_request(self, number: int, victim: int, *, answers_first: bool) -> None:
        """Let the server kill the only child of `victim` at a request; with `answers_first` once the answer is sent."""
        self._kill_at, self._victim, self._answers_first = number, victim, answers_first
        self._killed.clear()
        self._last = {}

    def _answer(self, times: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes] | None:
        with self._lock:
            self._handled += 1
            number = self._handled
        if self._kill_at == number:
            self._last = body
            if not self._answers_first:
                self._kill()
                return None
        elif 0 < self._kill_at < number and not self._killed.is_set():
            # The work must not end before the kill, however late the thread that kills runs.
            assert self._killed.wait(60)
            return None
        return 200, {}, reply(write_answer(body))

    def _after(self, body: dict[str, Any]) -> None:
        if body == self._last and not self._killed.is_set():
            self._kill()

    def _kill(self) -> None:
        for child in Path(f"/proc/{self._victim}/task/{self._victim}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        self._killed.set()


def write_answer(body: dict[str, Any]) -> str:
    """Return scores or an answer that depend on the request alone."""
    draw = random.Random(json.dumps(body))
    keys = ("instruction", "informativeness", "truthfulness")
    return json.dumps({key: draw.randint(1, 5) for key in keys}) + f" #### {draw.randrange(2 * _ROWS)}"


def find_answers() -> Path:
    """Return the file of kept answers."""
    return Path(os.environ["FINETUNE_CACHE"]) / "answers.sqlite"


def count_kept() -> int:
    """Return how many answers the next process will find. It looks at a copy, because opening the file would tidy it up."""
    with tempfile.TemporaryDirectory() as folder:
        for file in find_answers().parent.glob(f"{find_answers().name}*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / find_answers().name)) as database:
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            return int(database.execute("SELECT count(*) FROM texts").fetchone()[0]) if tables else 0


def kill_and_finish(server: Server, work: Asking, seed: int, tries: int) -> Tally:
    """Kill the work at moments that the seed draws, start it again, and compare what comes out and what was asked."""
    root, kind = Path(os.path.commonpath([work.folder, find_answers()])), work.kind
    for _ in range(2):  # the first run also makes what is cached
        work.clear()
        whole = server.run(kind.start, root)
        assert whole.status == 0, whole.text
    expected, asked = kind.hash_results(), set(work.server.answered)
    # Threads write the kept answers, so the number of operations varies a little.
    tally, draw = Tally(kind.name, "kill", whole.operations), random.Random(seed)
    for number in range(tries):
        work.clear()
        at = draw.randint(1, whole.operations * 9 // 10) if number % 2 == 0 else -1
        if at < 0:
            work.kill_at_request(draw.randint(1, len(asked) - 1), server.process_id, answers_first=number % 4 == 1)
        killed = server.run(kind.start, root, at, KILL)
        work.server.wait_until_idle()
        tally.tries += 1
        tally.stopped += killed.status == -signal.SIGKILL
        kept, paid = count_kept(), work.server.answered.copy()
        work.kill_at_request(0, 0, answers_first=False)
        finished = server.run(kind.start, root)
        _check(work, tally, finished, number, expected)
        # A thread that asks has kept the answer before.
        most = _CONCURRENCY if at >= 0 or number % 4 == 1 else _CONCURRENCY - 1
        _count_paid(work, tally, number, (kept, paid, most), asked)
    return tally


def _check(work: Asking, tally: Tally, finished: Outcome, number: int, expected: dict[str, str]) -> None:
    if finished.status != 0:
        tally.note("lost", number, finished.text)
    elif work.kind.hash_results() != expected:
        tally.note("another result", number, finished.text)
    if left := [path.name for path in work.folder.iterdir() if path.name.startswith(".")]:
        tally.note("left behind", number, str(left))


def _count_paid(
    work: Asking, tally: Tally, number: int, before: tuple[int, Counter[str], int], asked: set[str]
) -> None:
    """Compare what was answered twice with what was on its way at the kill, which is at most what is asked at the same time."""
    kept, paid, most = before
    lost = paid.total() - kept
    twice = work.server.answered.total() - len(asked)
    if twice != lost or not 0 <= lost <= most or set(work.server.answered) != asked:
        tally.note("paid twice", number, f"{paid.total()} answered, {kept} kept, {twice} answered again")
    tally.repeated += twice
