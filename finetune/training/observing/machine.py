"""Write the state of the machine at each logged step into `machine.jsonl`, for the page of the run.

It is a file of its own: times and temperatures differ from run to run, and the metrics of two equal runs are equal.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.files.json_files import continue_lines
from finetune.runs.run_files import MACHINE_FILE, count_tokens_seen

# They ask NVIDIA's driver by the package nvidia-ml-py, where it is installed. torch gives the power in milliwatts.
_SENSORS: Mapping[str, Callable[[], float]] = {
    "gpu_temperature": lambda: torch.cuda.temperature(),
    "gpu_power_watts": lambda: torch.cuda.power_draw() / 1000,
    "gpu_utilisation": lambda: torch.cuda.utilization() / 100,
}


class GpuSensors:
    """Reads the memory, the temperature, the power and the utilisation of this process's GPU; what cannot be read is left out."""

    def __init__(self, sensors: Mapping[str, Callable[[], float]] = _SENSORS) -> None:
        self._sensors = dict(sensors)

    def read(self) -> dict[str, float]:
        """Return the values by name; nothing on a machine without a GPU."""
        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        found: dict[str, float] = {
            "gpu_memory_bytes": total - free,
            "gpu_peak_bytes": torch.cuda.max_memory_reserved(),
        }
        for name, read in list(self._sensors.items()):
            try:
                found[name] = read()
            except Exception:  # the driver's own error class cannot be named where its package is missing
                del self._sensors[name]
        return found


class MachineWriter(TrainerCallback):
    """Appends the machine's state at each logged step: speed, time left, memory, disk and GPU."""

    def __init__(self, run: Path, sensors: GpuSensors | None = None) -> None:
        self._run = run
        self._file = run / MACHINE_FILE
        self._sensors = sensors or GpuSensors()
        self._process = psutil.Process()
        self._start: tuple[float, int] = (0.0, 0)
        # The time and the tokens of the last logged step; tokens are unknown where a run was resumed.
        self._last: tuple[float, int | None] = (0.0, None)
        # The seconds of evaluations since then, and the time at which the newest one ended.
        self._evaluating, self._evaluated = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the lines of a stopped run behind the checkpoint, and start the clock."""
        if state.is_world_process_zero:
            continue_lines(self._file, state.global_step)
            self._file.touch()
        now = time.perf_counter()
        self._start = (now, state.global_step)
        self._last = (now, None if state.global_step else 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count what followed an evaluation, such as the answers to the fixed prompts, as time that is no training."""
        if self._evaluated:
            self._evaluating += time.perf_counter() - self._evaluated
            self._evaluated = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line for a step of the training; evaluations only count as time that is no training."""
        line = logs or {}
        if not state.is_world_process_zero or "train_loss" in line:
            return
        runtimes = [value for name, value in line.items() if name.endswith("_runtime")]
        if runtimes:
            self._evaluating += sum(runtimes)
            self._evaluated = time.perf_counter()
            return
        content = {"step": state.global_step, **self._measure_speed(state, line), **self._read_machine()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    def _measure_speed(self, state: TrainerState, line: Mapping[str, Any]) -> dict[str, float]:
        now, (then, before), tokens = time.perf_counter(), self._last, count_tokens_seen([line]) or None
        seconds = now - then - self._evaluating
        self._last, self._evaluating = (now, tokens), 0.0
        begun, first = self._start
        steps, found = state.global_step - first, {"seconds": round(now - begun, 2)}
        if steps > 0:
            found["seconds_left"] = round((now - begun) / steps * (state.max_steps - state.global_step), 1)
        if tokens is not None and before is not None and seconds > 0:
            found["tokens_per_second"] = round((tokens - before) / seconds, 1)
        return found

    def _read_machine(self) -> dict[str, float]:
        return {
            "memory_bytes": self._process.memory_info().rss,
            "disk_free_bytes": shutil.disk_usage(self._run).free,
            **self._sensors.read(),
        }
