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
    """Without the tests, which run on a processor in the rest of the suite, and without Unsloth, which is not installed here."""
    parts = ["memory", "speed", "plain", "auto", "unsloth", "export"]
    table = measure(tmp_path, "--rehearse", "--parts", ",".join(parts))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(parts, 0)
    counts = {"plans": 6, "memory": 5, "speed": 2, "plain": 2, "auto": 2, "export": 3}
    assert {name: len(found[name]) for name in counts} == counts
    assert not [row for name in counts for row in found[name] if "error" in row]
    assert found["unsloth"] == [{"name": "Unsloth: all settings", "skipped": "unsloth is not installed"}]
    for ours, fast, plain in zip(found["speed"], found["auto"], found["plain"], strict=True):
        assert ours["setting"] == fast["setting"] == plain["setting"]
        # All trained as many tokens a step, packed or not.
        assert {row["step_tokens"] for row in (ours, fast, plain)} == {512}
    assert "| 2 rows of 256 tokens, packed from short rows | plain TRL |" in table
    assert "| all settings | Unsloth | not measured: unsloth is not installed ||||||||" in table
    assert (tmp_path / "gpu.md").read_text().startswith("CPU; Python")


def test_a_part_of_another_name_is_refused(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--rehearse",
        "--parts",
        "speeed",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--parts speeed: speeed is none of tests, memory, speed, plain," in done.stderr
    assert not list(tmp_path.iterdir())
