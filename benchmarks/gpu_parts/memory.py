"""Train two steps of every case and write the peaks of the device's memory; a process of its own, started by gpu.py."""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_parts.cases import GIB, Case, list_cases, list_overrides, write_rows
from gpu_parts.clock import read_peaks, watch_trainers
from gpu_parts.lines import record

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


def main() -> None:
    """Measure all cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--share", default="0/1", help="which cases of how many shares, such as 0/3")
    arguments = parser.parse_args()
    number, shares = map(int, arguments.share.split("/"))
    for case in list_cases(arguments.rehearse)[number::shares]:
        record(arguments.output, case.name, lambda case=case: measure_case(case, arguments.base))


if __name__ == "__main__":
    main()
