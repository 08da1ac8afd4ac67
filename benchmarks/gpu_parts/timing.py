"""Measure one program at every setting: tokens a second, the share of what the card attains, and the peak memory."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_parts.clock import Watch, synchronize, watch_trainers
from gpu_parts.lines import record
from gpu_parts.settings import FIRST_MEASURED, PROFILED, Setting, count_step_flops, list_settings

# Trains on a base with the rows of a file, into a folder.
Train = Callable[[Path, Path, Path, Setting], None]


def measure_program(program: str, train: Train, arguments: argparse.Namespace) -> None:
    """Measure one program at every setting, and write each result as soon as it is known."""
    if arguments.wait:
        sys.stdin.read()  # the libraries are imported while another part measures
    base = arguments.base / "llama"
    peak = measure_attainable(512 if arguments.rehearse else 8192)
    for setting in list_settings(arguments.rehearse)[: arguments.settings]:

        def measure(setting: Setting = setting) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder, watch_trainers(PROFILED) as watch:
                run = Path(folder) / "run"
                train(base, arguments.base / "rows" / setting.file, run, setting)
                found = describe_speed(watch, setting, count_step_flops(base, setting)) | read_ways(run)
            return found | {"attainable_flops": peak}

        record(arguments.output, f"{program}: {setting.name}", measure, arguments.missing)


def measure_attainable(width: int) -> float:
    """Return the operations a second of a large product of bfloat16 matrices, the best of some tries: what this card attains."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds, repeats = [], 4
    for _ in range(8):
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            left @ right
        synchronize()
        seconds.append((time.perf_counter() - started) / repeats)
    del left, right
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return 2 * width**3 / min(seconds)


def read_ways(run: Path) -> dict[str, Any]:
    """Return what `model.speed: auto` found of its ways, if it is a run of the kit that tried them."""
    file = run / "run.json"
    speed = json.loads(file.read_text(encoding="utf-8")).get("speed") if file.is_file() else None
    return {"speed": speed} if speed else {}


def describe_speed(watch: Watch, setting: Setting, flops: float) -> dict[str, Any]:
    """Return seconds a step, tokens a second, the operations a second, and the peak memory, without the first steps.

    `flops` are those of one step of the setting. A program that took other rows, such as one that does not pack, is known by its tokens.
    """
    measured = sorted(watch.seconds[FIRST_MEASURED:])
    median = measured[len(measured) // 2]
    tokens = watch.tokens[FIRST_MEASURED]
    return {
        "setting": setting.name,
        "seconds": median,
        "step_tokens": tokens,
        "expected_tokens": setting.step_tokens,
        "tokens_per_second": tokens / median,
        "flops_per_second": flops * tokens / setting.step_tokens / median,
        "allocated": watch.training[0],
        "reserved": watch.training[1],
        "kernels": watch.kernels,
        "busy_seconds": watch.busy_seconds,
        "longest_kernels": watch.longest,
        "all_seconds": watch.seconds,
        "losses": watch.losses,
    }
