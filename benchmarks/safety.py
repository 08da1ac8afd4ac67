"""Measure what the checks cost that keep results safe: hashes, locks, and the look at every step's numbers.

    python benchmarks/safety.py

It runs on `nano`, on the CPU, and writes safety.md beside this file.
"""

import hashlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.files.safety import manifests
from finetune.files.safety.locks import lock_folder
from finetune.training.journal.safeguards import FiniteNumbers

_REPEATS = 15


class _Trainer:
    """What the look at numbers needs of a trainer."""

    class accelerator:  # noqa: N801
        scaler = None
        clip_grad_norm_ = staticmethod(lambda: torch.tensor(1.0))

    training_step = staticmethod(lambda: torch.tensor(2.0))


class _State:
    global_step = 1


def measure(work: Callable[[], object]) -> float:
    """Return the median of some calls, in seconds."""
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def check_numbers(trainer: _Trainer, numbers: FiniteNumbers) -> None:
    """Do what is added to one step."""
    trainer.training_step()
    trainer.accelerator.clip_grad_norm_()
    numbers.on_pre_optimizer_step(None, _State(), None)


def check_fold(folder: Path) -> None:
    """Hash a folder as a new process does."""
    manifests._checked.clear()
    assert manifests.find_damage(folder) is None


def main() -> None:
    """Measure, and write the table."""
    fold = as_llama(find_checkpoint("nano"))
    size = sum(file.stat().st_size for file in fold.iterdir())
    trainer = _Trainer()
    numbers = FiniteNumbers(trainer)
    step = measure(lambda: check_numbers(trainer, numbers))
    hashing = measure(lambda: check_fold(fold))
    block = bytes(1 << 26)
    speed = len(block) / measure(lambda: hashlib.sha256(block).digest())
    with tempfile.TemporaryDirectory() as folder:

        def take_lock() -> None:
            with lock_folder(Path(folder)):
                pass

        locking = measure(take_lock)
    lines = [
        "# What the checks cost",
        "",
        f"Written by `benchmarks/safety.py`: {platform.machine()}, {os.cpu_count()} cores, medians of {_REPEATS}.",
        "",
        "| what | cost |",
        "|---|---|",
        f"| the look at losses and gradient norm, each step | {step * 1e6:.0f} µs: below 2 % of any step above {step * 50e3:.1f} ms |",
        f"| hashes of the fold of `nano` ({size / 1e6:.1f} MB), once a process | {hashing * 1e3:.0f} ms |",
        f"| SHA-256 on one core | {speed / 1e9:.2f} GB/s: {4.85e9 / speed:.1f} s for a fold of `base`, divided by the cores that hash its files at once |",
        f"| the lock of a run directory | {locking * 1e3:.2f} ms |",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
