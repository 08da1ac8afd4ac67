"""Measure what the checks cost that keep results safe: hashes, locks, and the look at every step's numbers.

    python benchmarks/safety.py [--steps 200] [--place FOLDER]

It trains `nano` on the CPU, and writes safety.md beside this file. Everything is CPU time, of all threads of the process, so that other
work on the machine counts little. The checks of a step are switched on and off from one step to the next within one run.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune.check.recipes import load_recipe
from finetune.files.resources import find_demo_data
from finetune.files.safety import manifests
from finetune.runs import resuming
from finetune.training import run
from finetune.training.journal import safeguards

_BASE_GIGABYTES = 4.85  # the fold of the published base model
_TRAINER = (
    "{max_steps: %d, per_device_train_batch_size: %d, learning_rate: 1e-4, logging_steps: 1000, save_steps: %d, eval_strategy: 'no', "
    "lr_scheduler_type: constant, gradient_checkpointing: false, disable_tqdm: true}"
)
# name, rows in a batch, repetitions of a row's answer: the smallest step that there is, and one of the demo's size
_SHAPES = (("1 row of about 30 tokens", 1, 1), ("8 rows of about 120 tokens", 8, 12))
_CHECKED = {
    safeguards.FiniteNumbers: ("on_pre_optimizer_step", "_see_loss", "_see_norm"),
    safeguards.SignalWatch: ("on_substep_end", "on_step_end"),
}


class Costs:
    """The CPU seconds of the functions that are watched, by name, and whether the checks of steps are switched on."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.is_on = True

    def watch(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and notes its CPU time; a check that is switched off returns its argument."""

        def call(*arguments: Any, **options: Any) -> Any:
            if not self.is_on:
                return arguments[-1] if name.startswith("_see") else None
            started = time.process_time()
            try:
                return work(*arguments, **options)
            finally:
                self.seconds.setdefault(name, []).append(time.process_time() - started)

        return call


class StepClock(TrainerCallback):
    """Notes the CPU time of every step, from begin to begin, and switches the checks on for every second one."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self._began = costs, 0.0
        self.steps: dict[bool, list[float]] = {True: [], False: []}

    def on_step_begin(self, *arguments: object, **options: object) -> None:
        """Note the step before, and switch."""
        now = time.process_time()
        if self._began:
            self.steps[self._costs.is_on].append(now - self._began)
        self._costs.is_on = not self._costs.is_on
        self._began = time.process_time()

    def on_save(self, *arguments: object, **options: object) -> None:
        """Leave a step with a checkpoint out: the cost of checkpoints is measured by itself."""
        self._began = 0.0


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put another value under a name within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def write_recipe(folder: Path, steps: int, batch: int, repeats: int) -> Path:
    """Write rows of one length, and a recipe for them."""
    line = json.loads(find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines()[0])
    line["messages"][-1]["content"] = " ".join([line["messages"][-1]["content"]] * repeats)
    (folder / "rows.jsonl").write_text((json.dumps(line) + "\n") * 64, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{checkpoint: nano}}\ndata: {{train: {folder / 'rows.jsonl'}, max_tokens: 512}}\nanswers: 0\n"
        f"adapter: {{rank: 8, alpha: 16}}\ntrainer: {_TRAINER % (steps, batch, steps)}\noutput: {folder / 'run'}\n",
        encoding="utf-8",
    )
    return recipe


def measure_steps(steps: int, batch: int, repeats: int) -> tuple[float, float, float]:
    """Train, and return medians in CPU seconds: a step with the checks, a step without, and the checks of one step alone."""
    costs = Costs()
    clock = StepClock(costs)
    add_journal = run.add_journal

    def add_clock(trainer: Any, folder: Path, **options: bool) -> None:
        add_journal(trainer, folder, **options)
        trainer.add_callback(clock)

    before = {(owner, name): getattr(owner, name) for owner, names in _CHECKED.items() for name in names}
    with tempfile.TemporaryDirectory() as folder, replaced(run, "add_journal", add_clock):
        for (owner, name), work in before.items():
            setattr(owner, name, costs.watch(name, work))
        try:
            run.run_training(load_recipe(write_recipe(Path(folder), steps, batch, repeats)))
        finally:
            for (owner, name), work in before.items():
                setattr(owner, name, work)
    watched = sum(sum(times) for times in costs.seconds.values()) / max(len(costs.seconds["on_pre_optimizer_step"]), 1)
    return statistics.median(clock.steps[True]), statistics.median(clock.steps[False]), watched


def measure_start(starts: int) -> dict[str, float]:
    """Start prepared runs as new processes do, and return medians in CPU seconds: all, and each kind of check."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), 1, 8, 12)
        run.run_training(load_recipe(recipe, [f"output={folder}/first"]))
        for number in range(starts):
            manifests._checked.clear()
            costs = Costs()
            train = run._train
            ended: list[float] = []

            def stop_clock(*arguments: Any, train: Any = train, ended: list[float] = ended) -> Any:
                ended.append(time.process_time())
                return train(*arguments)

            with (
                replaced(run, "_train", stop_clock),
                replaced(manifests, "_compare", costs.watch("hashes of the caches", manifests._compare)),
                replaced(resuming, "_make_folders", costs.watch("the run directory", resuming._make_folders)),
            ):
                started = time.process_time()
                run.run_training(load_recipe(recipe, [f"output={folder}/run{number}"]))
            found.setdefault("all", []).append(ended[0] - started)
            # The run hashes no checkpoint of its own before its first step; what it hashes is there by then.
            for name, times in costs.seconds.items():
                found.setdefault(name, []).append(sum(times))
    return {name: statistics.median(times) for name, times in found.items()}


def measure(work: Callable[[], object], repeats: int = 15) -> float:
    """Return the median of some calls, in CPU seconds."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def measure_lock() -> float:
    """Return what it costs to take the lock of a folder and to give it back."""
    with tempfile.TemporaryDirectory() as folder:

        def take() -> None:
            with resuming.lock_folder(Path(folder)):
                pass

        return measure(take)


def measure_hashing(place: Path | None) -> tuple[float, float]:
    """Hash a folder of the size of the real fold, five files, as a start does; return CPU seconds and wall seconds."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        one = folder / "model-1.safetensors"
        size = int(_BASE_GIGABYTES / 5 * 1e9)
        block = os.urandom(1 << 24)
        with one.open("wb") as file:
            while file.tell() < size:
                file.write(block[: size - file.tell()])
        for number in range(2, 6):  # second names of one file, which is larger than any cache of a processor
            (folder / f"model-{number}.safetensors").hardlink_to(one)
        manifests.write_manifest(folder)
        manifests._checked.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        assert manifests.find_damage(folder) is None
        return time.process_time() - cpu, time.perf_counter() - wall


def measure_seal() -> tuple[float, float]:
    """Return the CPU seconds that sealing a checkpoint of the demo's adapter takes, and those of writing the checkpoint."""
    costs = Costs()
    seal, save = safeguards.CheckpointSeal.on_save, run.Trainer._save_checkpoint
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), 8, 8, 12)
        with (
            replaced(safeguards.CheckpointSeal, "on_save", costs.watch("seal", seal)),
            replaced(run.Trainer, "_save_checkpoint", costs.watch("save", save)),
        ):
            run.run_training(load_recipe(recipe, ["trainer.save_steps=1"]))
    return statistics.median(costs.seconds["seal"]), statistics.median(costs.seconds["save"])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--place", type=Path, help="a folder with a gigabyte of room; a file system in memory is best")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# What the checks cost",
        "",
        f"Written by `benchmarks/safety.py`: {platform.machine()}, {os.cpu_count()} cores, one thread, `nano`. All figures are CPU time of "
        "the whole process,",
        f"medians; the checks were switched on and off from step to step of one run of {arguments.steps} steps, so that both sides met the "
        "same",
        "machine. *the checks alone* is the time within their functions, which the noise of the machine does not hide.",
        "",
        "| a training step | with | without | difference | the checks alone |",
        "|---|---|---|---|---|",
    ]
    for name, batch, repeats in _SHAPES:
        on, off, alone = measure_steps(arguments.steps, batch, repeats)
        lines.append(
            f"| {name} | {on * 1e3:.2f} ms | {off * 1e3:.2f} ms | {100 * (on / off - 1):+.2f} % | {alone * 1e6:.0f} µs, "
            f"{100 * alone / off:.2f} % |"
        )
    lines += ["", "| what | cost |", "|---|---|"]
    start = measure_start(7)
    cpu, wall = measure_hashing(arguments.place)
    seal, save = measure_seal()
    lines += [
        f"| start of a prepared run until its first step | {start.pop('all'):.2f} s, of which {start['hashes of the caches'] * 1e3:.0f} ms "
        "for hashes of cached rows and fold |",
        f"| the lock of a run directory | {measure_lock() * 1e3:.2f} ms |",
        f"| hashes of a folder of {_BASE_GIGABYTES} GB (the fold of `base`), read from memory | {cpu:.2f} s of CPU time, {wall:.2f} s on "
        f"this machine's {os.cpu_count()} cores |",
        f"| sealing a checkpoint of the demo's adapter, with its hashes and the look at its weights | {seal * 1e3:.0f} ms, beside "
        f"{save * 1e3:.0f} ms for writing it |",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
