"""The measurement of a GPU is prepared: without one it says so, and every part runs with nano's sizes on the processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def measure(tmp_path, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(tmp_path), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def test_without_a_gpu_nothing_is_measured(tmp_path):
    assert "no NVIDIA GPU is visible, so nothing is measured" in measure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_part_runs_on_the_processor(tmp_path):
    table = measure(tmp_path, "--rehearse", "--parts", "memory,speed,auto,plain,export")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(
        ("base", "memory", "speed", "auto", "plain", "export"), 0
    )
    rows = [row for name in ("plans", "memory", "speed", "auto", "plain", "export") for row in found[name]]
    assert len(rows) == 5 + 5 + 2 + 2 + 2 + 3
    assert not [row for row in rows if "error" in row]
    for ours, fast, plain in zip(found["speed"], found["auto"], found["plain"], strict=True):
        assert ours["setting"] == fast["setting"] == plain["setting"]
    assert "| 2 rows of 256 tokens | plain TRL |" in table
    assert (tmp_path / "gpu.md").read_text().startswith("CPU; Python")
