"""Measure the time and memory of `finetune plan` for the real model, and compare them with importing its libraries alone.

    python benchmarks/plan.py [--repeats 5]

Each plan and each import runs in a process of its own, in turn. The benchmark needs no GPU and no weights. It writes plan.md beside
this file.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

LOADING = "libraries, loaded only"
PLANS = {
    "`sft_qlora`, 4,096 tokens": ("sft_qlora", "-s", "data.max_tokens=4096"),
    "`sft_qlora`, 28,672 tokens": ("sft_qlora", "-s", "data.max_tokens=28672"),
    "`sft_full`": ("sft_full",),
    "`dpo_qlora`": ("dpo_qlora",),
    "`pretrain`": ("pretrain",),
}
LIBRARIES = "import torch, datasets, bitsandbytes, peft, trl; from transformers import LlamaForCausalLM, Trainer"


def measure(command: list[str]) -> tuple[float, int]:
    """Run a command; return its wall time in seconds and its peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {os.waitstatus_to_exitcode(status)}")
    process.returncode = 0
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure every plan in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    commands = {LOADING: [sys.executable, "-c", LIBRARIES]}
    commands |= {name: [sys.executable, "-m", "finetune", "plan", *plan] for name, plan in PLANS.items()}
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(arguments.repeats):
        for name, command in commands.items():
            taken[name].append(measure(command))
    loading = statistics.median(seconds for seconds, _ in taken[LOADING])
    lines = [
        f"{platform.machine()}, Python {platform.python_version()}; median of {arguments.repeats}, least to most in brackets.",
        "",
        "| | seconds | of loading | resident memory, GB |",
        "|---|---|---|---|",
    ]
    for name, figures in taken.items():
        seconds = [one for one, _ in figures]
        middle = statistics.median(seconds)
        memory = max(one for _, one in figures) / 1e9
        spread = f"{middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        lines.append(f"| {name} | {spread} | {middle / loading:.2f} x | {memory:.2f} |")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
