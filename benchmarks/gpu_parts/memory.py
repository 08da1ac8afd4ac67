"""Train two steps of every case and write the peaks of the device's memory; a process of its own, started by gpu.py."""

import argparse
import contextlib
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_parts.cases import GIB, Case, list_cases, list_overrides, write_rows
from gpu_parts.clock import read_peaks, watch_trainers
from gpu_parts.lines import record, write_line
from gpu_parts.settings import wait_for_base

import finetune
from finetune.check.recipes import load_recipe
from finetune.files.resources import list_all_recipes
from finetune.planning.hardware import CONTEXT_BYTES, CUBLAS_BYTES


def measure_case(case: Case, base: Path) -> dict[str, Any]:
    """Train two steps and return the peaks in bytes, before and during them; `left` is what an earlier case did not free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        limit = case.card_gib * GIB - CONTEXT_BYTES if case.card_gib else None
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total) if limit else 1.0)
    left = count_held()
    read_peaks()
    with tempfile.TemporaryDirectory() as folder:
        overrides = list_overrides(case, base, write_rows(Path(folder), case, base), Path(folder) / "run")
        resolved = load_recipe(list_all_recipes()[case.recipe], overrides)
        with watch_trainers() as watch:
            finetune.train(resolved, force=True)
    return {
        "card_gib": case.card_gib,
        "loading_allocated": watch.loading[0],
        "allocated": watch.training[0],
        "reserved": watch.training[1],
        "left": left,
        "context": watch.context,
        "seconds": watch.seconds,
        "losses": watch.losses,
    }


def count_held() -> int:
    """Return the bytes that an earlier case left, such as a table that bitsandbytes keeps a reference to, without cuBLAS's."""
    if not torch.cuda.is_available():
        return 0
    return max(0, torch.cuda.memory_allocated() - CUBLAS_BYTES)


def find_obstacle(case: Case) -> str | None:
    """Return why a case cannot be measured on this card, or None."""
    if case.card_gib is None or not torch.cuda.is_available():
        return None
    # A card of 80 GB has a little less than 80 GiB.
    has = torch.cuda.get_device_properties(0).total_memory / GIB
    return f"this card has {has:.0f} GiB" if has < 0.95 * case.card_gib else None


def claim(folder: Path, case: Case) -> bool:
    """Say whether this process is the first of those that share the cases to ask for one."""
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / case.name.replace("/", "_")).touch(exist_ok=False)
        return True
    return False


def main() -> None:
    """Measure the cases that no other process has begun, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--missing", action="store_true", help="only what the output does not hold yet")
    parser.add_argument(
        "--claims", type=Path, required=True, help="a folder, empty at first, of the cases that were begun"
    )
    parser.add_argument("--alone", action="store_true", help="the cases that need the whole card")
    arguments = parser.parse_args()
    wait_for_base(arguments.base)
    for case in list_cases(arguments.rehearse):
        if case.alone != arguments.alone or not claim(arguments.claims, case):
            continue
        if reason := find_obstacle(case):
            write_line(arguments.output, {"name": case.name, "card_gib": case.card_gib, "skipped": reason})
            continue

        def measure(case: Case = case) -> dict[str, Any]:
            return measure_case(case, arguments.base)

        record(arguments.output, case.name, measure, arguments.missing)


if __name__ == "__main__":
    main()
