"""Read the state of a run's machine: speed, time left, memory against the plan, GPU and disk."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.files.json_files import read_lines
from finetune.runs.run_files import MACHINE_FILE
from finetune.watching.cautions import is_number

_GB = 1e9
_PLANNED = "planned_bytes"


def read_machine(folder: Path, planned_bytes: int | None) -> list[dict[str, Any]]:
    """Return the machine's lines, oldest first; those of a GPU hold the planned peak too."""
    lines = [line for _, line in read_lines(folder / MACHINE_FILE)]
    planned = {} if planned_bytes is None else {_PLANNED: planned_bytes}
    return [{**line, **planned} if "gpu_memory_bytes" in line else line for line in lines]


def list_machine_figures(lines: Sequence[Mapping[str, Any]], *, is_running: bool) -> Iterator[tuple[str, str]]:
    """Yield names and values of the newest state, for a person."""
    last = lines[-1] if lines else {}
    if is_running:
        if is_number(last.get("seconds_left")):
            yield "time left", _describe_seconds(last["seconds_left"])
        if is_number(last.get("tokens_per_second")):
            yield "tokens a second", f"{last['tokens_per_second']:,.0f}"
    peaks = [line["gpu_peak_bytes"] for line in lines if is_number(line.get("gpu_peak_bytes"))]
    if peaks:
        planned = f" of {last[_PLANNED] / _GB:.2f} planned" if is_number(last.get(_PLANNED)) else ""
        yield "GPU memory, peak", f"{max(peaks) / _GB:.2f}{planned} GB"
    for name, key, form in _FIGURES:
        if is_number(last.get(key)):
            yield name, form(last[key])


def _describe_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _describe_size(size: float) -> str:
    return f"{size / _GB:.2f} GB"


_FIGURES = (
    ("GPU temperature", "gpu_temperature", "{:.0f} °C".format),
    ("GPU power", "gpu_power_watts", "{:.0f} W".format),
    ("GPU utilisation", "gpu_utilisation", "{:.0%}".format),
    ("main memory of the process", "memory_bytes", _describe_size),
    ("disk left", "disk_free_bytes", _describe_size),
)
