"""Every preference method on files of pairs and of liked answers: held-out loss before and after 50 steps of `nano` in 4 bits.

    python benchmarks/preferences.py --pairs dpo_en_demo.json --labelled kto_en_demo.json

The two files are LLaMA-Factory's demonstrations (its repository's folder data); any others of pairs and labelled rows will do.
Every run is `finetune train` in a process of its own, on the CPU, and every result but the reward model's is exported and
compared with what was trained. Writes preferences.md beside this file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STEPS = 50


@dataclass(frozen=True)
class Case:
    """A method, what it reads, its rows a step and its learning rate."""

    method: str
    rows: str
    batch: int
    rate: float
    options: Mapping[str, Any]


CASES = (
    Case("dpo", "pairs", 4, 5e-4, {}),
    Case("kto", "labelled", 8, 2e-4, {}),
    Case("kto", "pairs", 8, 5e-4, {}),
    Case("orpo", "pairs", 4, 1e-3, {}),
    Case("cpo", "pairs", 4, 1e-3, {}),
    Case("simpo", "pairs", 4, 1e-3, {}),
    Case("reward", "pairs", 4, 2e-4, {}),
)


def make_recipe(case: Case, file: Path, output: Path) -> dict[str, Any]:
    """Return the recipe of a case."""
    return {
        "method": case.method,
        "model": {"checkpoint": "nano", "quantize": "nf4"},
        "data": {"train": str(file.resolve()), "held_out": 0.2, "max_tokens": 512, "overflow": "truncate"},
        "adapter": {"rank": 16},
        "trainer": {
            "max_steps": STEPS,
            "per_device_train_batch_size": case.batch,
            "learning_rate": case.rate,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": STEPS,
            "logging_steps": 10,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **case.options,
        },
        "answers": 0,
        "output": str(output),
    }


def run(*words: object) -> dict[str, Any]:
    """Run a verb and return the object that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "finetune", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(case: Case, file: Path, folder: Path) -> str:
    """Train a case, export it, and return its line of the table."""
    recipe, output = folder / "recipe.yaml", folder / "run"
    recipe.write_text(yaml.safe_dump(make_recipe(case, file, output)), encoding="utf-8")
    run("train", recipe)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [line for line in lines if "eval_loss" in line]
    before, after = held_out[0], held_out[-1]
    counts = json.loads((output / "run.json").read_text(encoding="utf-8"))["data"]
    accuracies = [
        f"{line[name]:.0%}"
        for line in (before, after)
        for name in ("eval_rewards/accuracies", "eval_accuracy")
        if name in line
    ]
    exported = "none"
    if case.method != "reward":
        exported = f"{run('export', output, '-o', folder / 'export')['verify']['max_abs']:.1e}"
    return (
        f"| `{case.method}` | {counts['train']['rows']}, {counts['evaluation']['rows']} of `{file.stem}` | {case.batch}, {case.rate:g} "
        f"| {before['eval_loss']:.3f}, {after['eval_loss']:.3f} | {', '.join(accuracies)} | {exported} |"
    )


def main() -> None:
    """Take every case in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--labelled", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    if arguments.pairs is None or arguments.labelled is None:
        print("left out: --pairs and --labelled name the files to train on, which are not bundled")
        return
    lines = [
        f"{platform.machine()}, Python {platform.python_version()}; one run each, {STEPS} steps, rank 16, rows cut at 512 tokens.",
        "",
        "| method | rows trained on, held out | rows a step, rate | held-out loss before, after | held-out rewards in the right order | export, largest difference of a logit |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(case, vars(arguments)[case.rows], Path(folder)))
        print(lines[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
