"""The state of the machine at each logged step: speeds by the clock, a GPU's sensors, and nothing of it in the metrics."""

import json
from types import SimpleNamespace

import pytest
import torch

from finetune.runs.run_files import MACHINE_FILE
from finetune.training.observing import machine
from finetune.training.observing.machine import GpuSensors, MachineWriter


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now.seconds)
    return now


def step(number, most=10):
    return SimpleNamespace(is_world_process_zero=True, global_step=number, max_steps=most)


def read(run):
    return [json.loads(line) for line in (run / MACHINE_FILE).read_text().splitlines()]


def test_speeds_are_measured_between_logged_steps_without_evaluations(clock, tmp_path):
    writer = MachineWriter(tmp_path, GpuSensors({}))
    writer.on_train_begin(None, step(0), None)
    clock.seconds += 2
    writer.on_log(None, step(1), None, {"loss": 1.0, "num_tokens": 500.0})
    clock.seconds += 7
    writer.on_log(None, step(2), None, {"eval_loss": 1.0, "eval_runtime": 5.0})
    clock.seconds += 30  # the answers to the fixed prompts, which the evaluation does not count
    writer.on_step_begin(None, step(2), None)
    clock.seconds += 2
    writer.on_step_begin(None, step(3), None)
    writer.on_log(None, step(3), None, {"loss": 1.0, "num_tokens": 900.0})
    writer.on_log(None, step(3), None, {"train_loss": 1.0, "train_runtime": 11.0})
    first, second = read(tmp_path)
    assert (first["step"], first["seconds"], first["seconds_left"], first["tokens_per_second"]) == (1, 2.0, 18.0, 250.0)
    # 400 tokens in 39 - 5 - 30 seconds; three steps took 41 seconds with the evaluation, and seven are left.
    assert (second["seconds_left"], second["tokens_per_second"]) == (95.7, 100.0)
    assert second["memory_bytes"] > 0 and second["disk_free_bytes"] > 0 and not any("gpu" in name for name in second)


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(clock, tmp_path):
    (tmp_path / MACHINE_FILE).write_text('{"step": 4}\n{"step": 5}\n')
    writer = MachineWriter(tmp_path, GpuSensors({}))
    writer.on_train_begin(None, step(4), None)
    clock.seconds += 3
    writer.on_log(None, step(5), None, {"loss": 1.0, "num_tokens": 500.0})
    kept, new = read(tmp_path)
    # How many tokens were seen before is not known.
    assert kept == {"step": 4} and new["seconds_left"] == 15.0 and "tokens_per_second" not in new


def test_a_sensor_that_fails_is_asked_once(monkeypatch):
    asked = []

    def fail():
        asked.append(1)
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2_000, 10_000))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7_000)
    sensors = GpuSensors({"gpu_power_watts": fail, "gpu_temperature": lambda: 61})
    expected = {"gpu_memory_bytes": 8_000, "gpu_peak_bytes": 7_000, "gpu_temperature": 61}
    assert [sensors.read(), sensors.read()] == [expected, expected] and len(asked) == 1


def test_torch_is_asked_in_its_units(monkeypatch):
    """torch gives milliwatts and percent."""
    for name, value in (("temperature", 61), ("power_draw", 180_400), ("utilization", 97)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    values = {name: read() for name, read in machine._SENSORS.items()}
    assert values == {"gpu_temperature": 61, "gpu_power_watts": 180.4, "gpu_utilisation": 0.97}
