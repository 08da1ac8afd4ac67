"""Export a random adapter of the real size with its verification on the device, and measure a chat; started by gpu.py."""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_parts.clock import read_peaks, synchronize
from gpu_parts.lines import record

import finetune

NEW_TOKENS = 128


def measure_export(base: Path, verify: bool) -> dict[str, Any]:
    """Return seconds, peak of the device's memory, and what the comparison found."""
    read_peaks()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = finetune.export(base / "adapter", Path(folder) / "export", verify=verify)
        seconds = time.perf_counter() - started
    found = asdict(report.verify) if report.verify else None
    return {"seconds": seconds, "allocated": read_peaks()[0], "verify": found}


def measure_chat(base: Path) -> dict[str, Any]:
    """Return the seconds until a model is open, and the tokens a second of a greedy answer to a short question."""
    started = time.perf_counter()
    model = finetune.open_model(base / "llama")
    synchronize()
    opened = time.perf_counter() - started
    model.answer("2718", max_new_tokens=4)  # loads the kernels
    synchronize()
    started = time.perf_counter()
    reply = model.answer("3141", max_new_tokens=NEW_TOKENS)
    synchronize()
    seconds = time.perf_counter() - started
    return {"open_seconds": opened, "tokens": reply.tokens, "tokens_per_second": reply.tokens / seconds}


def main() -> None:
    """Measure the export with and without its verification, and the chat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--missing", action="store_true", help="only what the output does not hold yet")
    arguments = parser.parse_args()
    record(arguments.output, "chat", lambda: measure_chat(arguments.base), arguments.missing)
    record(
        arguments.output,
        "export without verification",
        lambda: measure_export(arguments.base, False),
        arguments.missing,
    )
    record(
        arguments.output, "export with verification", lambda: measure_export(arguments.base, True), arguments.missing
    )


if __name__ == "__main__":
    main()
