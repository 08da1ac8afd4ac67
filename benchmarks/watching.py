"""Measure what the page of a run costs: the lines of each logged step, the losses of rows, reading a long run, and opening it.

    python benchmarks/watching.py [--steps 100]

It trains `nano` on the CPU, and writes watching.md beside this file. All figures but the browser's are CPU time of the process.
The browser is a headless Chromium, where there is one.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safety import Costs
from transformers import TrainerCallback

from finetune.check.recipes import load_recipe
from finetune.files.resources import find_demo_data
from finetune.runs.run_files import MACHINE_FILE, METRICS_FILE
from finetune.training import run
from finetune.training.journal.answers import AnswerSheet
from finetune.training.journal.progress import MetricsWriter
from finetune.training.observing.machine import MachineWriter
from finetune.training.observing.measured_rows import RowSheet
from finetune.watching.board_page import render_board, write_board
from finetune.watching.run_view import read_board

_LOGGED = 10_000
_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_WRITERS = (MetricsWriter, MachineWriter)


class StepClock(TrainerCallback):
    """Notes the CPU time of every step, with what is logged behind it."""

    def __init__(self) -> None:
        self._began, self.steps = 0.0, list[float]()

    def on_step_begin(self, *arguments: object, **options: object) -> None:
        """Note the step before."""
        now = time.process_time()
        if self._began:
            self.steps.append(now - self._began)
        self._began = now


def train(folder: Path, steps: int) -> tuple[StepClock, Costs]:
    """Train steps of one short row, the smallest that there are, and log each; return their times and those of the page's parts."""
    line = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (folder / "rows.jsonl").write_text(f"{line}\n" * 64, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{checkpoint: nano}}\ndata: {{train: {folder / 'rows.jsonl'}, eval: {folder / 'rows.jsonl'}, max_tokens: 512}}\nanswers: 64\nrow_losses: 64\n"
        f"adapter: {{rank: 8, alpha: 16}}\noutput: {folder / 'run'}\ntrainer: {{max_steps: {steps}, per_device_train_batch_size: 1, "
        f"learning_rate: 1e-4, logging_steps: 1, save_strategy: 'no', eval_strategy: steps, eval_steps: {max(1, steps // 4)}, "
        "gradient_checkpointing: false, disable_tqdm: true}\n",
        encoding="utf-8",
    )
    clock, costs, add_journal = StepClock(), Costs(), run.add_journal
    watched = [(one, "on_log") for one in _WRITERS] + [(RowSheet, "write_before"), (RowSheet, "write_after")]
    watched.append((AnswerSheet, "ask"))
    before = [(owner, name, getattr(owner, name)) for owner, name in watched]

    def add_clock(trainer: Any, place: Path, **options: bool) -> None:
        add_journal(trainer, place, **options)
        trainer.add_callback(clock)

    run.add_journal = add_clock
    for owner, name, work in before:
        setattr(owner, name, costs.watch(f"{owner.__name__}.{name}", work))
    try:
        run.run_training(load_recipe(recipe))
    finally:
        run.add_journal = add_journal
        for owner, name, work in before:
            setattr(owner, name, work)
    return clock, costs


def make_long(folder: Path) -> None:
    """Write the lines of 10,000 logged steps into a run directory, in place of its own."""
    for name in (METRICS_FILE, MACHINE_FILE):
        line = json.loads((folder / name).read_text(encoding="utf-8").splitlines()[-1])
        lines = ({**line, "step": step, "loss": 3 - step / _LOGGED + (step % 7) / 10} for step in range(1, _LOGGED + 1))
        (folder / name).write_text("".join(f"{json.dumps(one)}\n" for one in lines), encoding="utf-8")


def measure(work: Callable[[], object], clock: Callable[[], float] = time.process_time, repeats: int = 9) -> float:
    """Return the median of some calls, in seconds."""
    found = []
    for _ in range(repeats):
        started = clock()
        work()
        found.append(clock() - started)
    return statistics.median(found)


def measure_browser(page: Path, empty: Path) -> str:
    """Return how much longer a browser takes for the page than for an empty one, from its start to the drawn document."""
    if _CHROMIUM is None:
        return "no browser on this machine"

    def open_page(file: Path) -> None:
        command = [_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
        drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert file == empty or "<polyline" in drawn

    empty.write_text("<!doctype html><title>x</title>", encoding="utf-8")
    full, nothing = (measure(lambda file=file: open_page(file), time.perf_counter, 5) for file in (page, empty))
    return f"{full - nothing:.2f} s ({full:.2f} s with the browser's own start)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock, costs = train(folder, steps)
        step = statistics.median(clock.steps)
        writers = {one.__name__: statistics.median(costs.seconds[f"{one.__name__}.on_log"]) for one in _WRITERS}
        passes = sum(sum(costs.seconds[f"RowSheet.{part}"]) for part in ("write_before", "write_after"))
        asking = statistics.median(costs.seconds["AnswerSheet.ask"])
        make_long(folder / "run")
        board = read_board([folder / "run"])
        reading = measure(lambda: write_board(read_board([folder / "run"])))
        page = folder / "page.html"
        page.write_text(render_board(board), encoding="utf-8")
        lines = [
            ("a training step of one row of about 30 tokens, logged", f"{1e3 * step:.2f} ms"),
            ("its line in metrics.jsonl", f"{1e6 * writers['MetricsWriter']:.0f} µs"),
            (
                "its line in machine.jsonl",
                f"{1e6 * writers['MachineWriter']:.0f} µs, {writers['MachineWriter'] / step:.2%} of the step",
            ),
            (
                "the losses of 64 rows before and after",
                f"{1e3 * passes:.0f} ms, as much as {passes / step:.1f} steps of one row",
            ),
            (
                "the answers at one evaluation, four prompts of up to 64 tokens",
                f"{1e3 * asking:.0f} ms, as much as {asking / step:.1f} steps of one row",
            ),
            (
                f"reading a run of {_LOGGED:,} logged steps for a live page",
                f"{1e3 * reading:.0f} ms, at most every {50 * reading:.0f} s",
            ),
            (f"a page of {_LOGGED:,} logged steps", f"{page.stat().st_size / 1e3:.0f} kB"),
            ("opening it in a headless Chromium", measure_browser(page, folder / "empty.html")),
        ]
    text = (
        f"# What the page of a run costs\n\nWritten by `benchmarks/watching.py`: {platform.machine()}, {torch.get_num_threads()} "
        f"thread(s), `nano`, {steps} steps.\nMedians of CPU time; the browser's figures are times by the clock.\n\n| what | cost |\n|---|---|\n"
    )
    text += "".join(f"| {what} | {cost} |\n" for what, cost in lines)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
