"""Measure on an NVIDIA GPU what the kit says of one: tests, memory against the plan, speed beside a plain TRL script, export and chat.

    python benchmarks/gpu.py [--wheels FOLDER] [--output DIR] [--parts checks,speed,auto,roomy,plain,export] [--rehearse]

It makes a random checkpoint of YuLan-Mini's real sizes, so nothing is downloaded. Every part is a process of its own with a time
limit, all together 8 minutes, and every result is saved as soon as it is known. Without a GPU it says so and ends; `--rehearse` runs
every part with nano's sizes on the processor. The results are gpu.json and gpu.md beside this file. `--wheels` names a folder of
gpu_wheels.py, for a machine that has PyTorch and no network.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_parts.lines import read_lines

HERE = Path(__file__).parent
ROOT = HERE.parent

# A card of this size holds three of the runs at once; each counts only the memory of its own process.
SHARED_CARD, SHARES = 70 * 2**30, 3
REHEARSAL_PATIENCE = 5
# The parts that measure the speed of one program each.
PROGRAMS = ("speed", "auto", "roomy", "plain")


@dataclass(frozen=True)
class Part:
    """A part of the measurement: commands that run at the same time, and the seconds after which they are stopped."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: int


def list_parts(base: Path, results: Path, extra: Sequence[str], card_bytes: int) -> list[Part]:
    """Return the parts in their order. The limits sum to less than 8 minutes."""

    def child(script: str, name: str, *options: str) -> tuple[str, ...]:
        command = (sys.executable, "-W", "ignore", str(HERE / "gpu_parts" / script), str(base))
        return (*command, str(results / f"{name}.jsonl"), *options, *extra)

    pytest = (
        "-m",
        "pytest",
        "-q",
        "-W",
        "default",
        "-n4",
        "-p",
        "no:cacheprovider",
        "--durations=15",
        "-rf",
        "tests/gpu",
    )
    shares = SHARES if card_bytes >= SHARED_CARD else 1
    memory = tuple(child("memory.py", "memory", "--share", f"{number}/{shares}") for number in range(shares))
    # Tests and memory are no matter of time, so they share a card that is large enough.
    plans = child("plans.py", "plans")
    first = [Part("checks", ((sys.executable, *pytest), *memory, plans), 190)]
    if shares == 1:
        first = [Part("tests", ((sys.executable, *pytest),), 80), Part("memory", (*memory, plans), 110)]
    return [
        *first,
        Part("speed", (child("speed.py", "speed", "--program", "ours"),), 55),
        Part("auto", (child("speed.py", "auto", "--program", "ours, speed auto"),), 90),
        Part("roomy", (child("speed.py", "roomy", "--program", "ours, no checkpointing", "--only", "4 rows"),), 70),
        Part("plain", (child("speed.py", "plain", "--program", "plain TRL"),), 55),
        Part("export", (child("export_chat.py", "export"),), 50),
    ]


def install_wheels(wheels: Path, folder: Path) -> dict[str, str]:
    """Install a folder of wheels beside the installed packages; return the environment in which they are found first."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    if not folder.exists():
        subprocess.run([*pip, "--target", str(folder), *map(str, sorted(wheels.glob("*.whl")))], check=True)
    return {"PYTHONPATH": str(folder)}


def run_part(part: Part, environment: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Run one part within its limit; return its exit status (None: it ran out of time) and its seconds."""
    started = time.monotonic()
    with log.open("wb") as file:
        running = [
            # A session of its own, so that a part that runs out of time is stopped with all its processes.
            subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            for command in part.commands
        ]
        statuses = [_wait(process, started + part.limit) for process in running]
    status = None if None in statuses else max(map(abs, filter(None, statuses)), default=0)
    seconds = time.monotonic() - started
    print(
        f"{part.name:8} {'ran out of time' if status is None else f'exit {status}'} after {seconds:.0f} s", flush=True
    )
    return {"status": status, "seconds": round(seconds, 1)}


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    try:
        return process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def ask_device(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the card's name and memory, empty where there is none, and the versions of the libraries."""
    script = (
        "import json, torch, transformers, peft, trl, bitsandbytes\n"
        "card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None\n"
        "print(json.dumps({'card': card.name if card else '', 'memory': card.total_memory if card else 0,"
        "'cuda': torch.version.cuda, **{m.__name__: m.__version__ for m in (torch, transformers, peft, trl, bitsandbytes)}}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, env=environment, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe(results: Mapping[str, Any]) -> str:
    """Return all results as Markdown."""
    device = results["device"]
    versions = ", ".join(f"{name} {device[name]}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"))
    where = f"{device['card']}, {device['memory'] / 2**30:.0f} GiB, CUDA {device['cuda']}" if device["card"] else "CPU"
    lines = [f"{where}; Python {platform.python_version()}, {versions}. One run of each.", ""]
    lines += [*describe_memory(results), "", *describe_speed(results), ""]
    for row in results.get("export", []):
        name, values = row["name"], {key: value for key, value in row.items() if key != "name"}
        lines.append(f"- {name}: " + ", ".join(f"{key} {_short(value)}" for key, value in values.items()))
    lines += ["", "Parts: " + "; ".join(f"{name} {_short(value)}" for name, value in results["parts"].items())]
    lines += ["", results["notes"]] if "notes" in results else []
    return "\n".join(lines) + "\n"


def describe_memory(results: Mapping[str, Any]) -> list[str]:
    """Return the table of measured and planned memory; what an earlier case left on the card is taken off."""
    plans = {row["name"]: row for row in results.get("plans", [])}
    lines = [
        "| run | allocated as planned, GiB | measured | difference | reserved | in all as planned |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.get("memory", []):
        plan = plans.get(row["name"], {"error": "not planned in time"})
        if "error" in row or "error" in plan:
            lines.append(f"| {row['name']} | {row.get('error', plan.get('error'))} |||||")
            continue
        allocated, reserved = row["allocated"] - row["left"], row["reserved"] - row["left"]
        lines.append(
            f"| {row['name']} | {_gib(plan['allocated'])} | {_gib(allocated)} | {allocated / plan['allocated'] - 1:+.1%} "
            f"| {_gib(reserved)} | {_gib(plan['peak'])} |"
        )
    return lines


def describe_speed(results: Mapping[str, Any]) -> list[str]:
    """Return the table of speed and memory, side by side."""
    plain = {row.get("setting"): row for row in results.get("plain", [])}
    lines = [
        "| setting | program | tokens/s | of plain TRL | TFLOP/s | GPU busy | kernels a step | allocated, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in PROGRAMS:
        for row in results.get(name, []):
            lines.append(_describe_program(row, plain))
    return lines


def _describe_program(row: Mapping[str, Any], plain: Mapping[str | None, Mapping[str, Any]]) -> str:
    program, _, setting = row["name"].partition(": ")
    if "error" in row:
        return f"| {setting} | {program} | {row['error']} ||||||"
    other = plain.get(row["setting"], {})
    ratio = f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}" if "tokens_per_second" in other else ""
    kernels = row.get("kernels", 0)  # on a processor none are counted
    busy, count = (f"{row['busy_seconds'] / row['seconds']:.0%}", f"{kernels:,}") if kernels else ("", "")
    return (
        f"| {setting} | {program} | {row['tokens_per_second']:,.0f} | {ratio} | {row['flops_per_second'] / 1e12:.0f} | {busy} "
        f"| {count} | {_gib(row['allocated'])} |"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return str(value)


def main() -> None:
    """Run the parts that were asked for and write both files after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wheels", type=Path, help="a folder of gpu_wheels.py, installed first")
    parser.add_argument("--output", type=Path, default=HERE, help="where gpu.json and gpu.md go")
    parser.add_argument("--parts", default="checks,tests,memory,speed,auto,roomy,plain,export", help="what to measure")
    parser.add_argument("--keep", type=Path, help="keep checkpoint and wheels in this folder, for another call")
    parser.add_argument("--patience", type=float, default=1.0, help="multiply the time limits, for a slow machine")
    parser.add_argument("--rehearse", action="store_true", help="every part with nano's sizes, on the processor")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        # Four test processes with a thread for every core each would wait for one another.
        environment = {
            "OMP_NUM_THREADS": "4",
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "FINETUNE_CACHE": str(folder / "cache"),
        }
        if arguments.wheels:
            environment |= install_wheels(arguments.wheels, folder / "site")
        environment["PYTHONPATH"] = os.pathsep.join(
            [*filter(None, [environment.get("PYTHONPATH")]), str(HERE), str(ROOT)]
        )
        if arguments.rehearse:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        device = ask_device(environment)
        if not device["card"] and not arguments.rehearse:
            print("no NVIDIA GPU is visible, so nothing is measured; --rehearse runs every part on the processor")
            return
        measure(arguments, folder, environment, device)


def measure(
    arguments: argparse.Namespace, folder: Path, environment: Mapping[str, str], device: Mapping[str, Any]
) -> None:
    """Make the checkpoint, run the parts, and write the results after each."""
    extra = ["--rehearse"] if arguments.rehearse else []
    arguments.output.mkdir(parents=True, exist_ok=True)
    base, lines, logs = folder / "base", folder / "results", arguments.output / "logs"
    lines.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    results: dict[str, Any] = {"device": device, "parts": {}}
    if not base.exists():
        make = (sys.executable, str(HERE / "gpu_parts" / "real_base.py"), str(base), *extra)
        results["parts"]["base"] = run_part(Part("base", (make,), 60), environment, logs / "base.log")
    wanted = arguments.parts.split(",")
    for part in list_parts(base, lines, extra, device["memory"]):
        if part.name in wanted:
            # A rehearsal shares a processor with whatever else runs there.
            patience = arguments.patience * (REHEARSAL_PATIENCE if arguments.rehearse else 1)
            patient = replace(part, limit=round(part.limit * patience))
            results["parts"][part.name] = run_part(patient, environment, logs / f"{part.name}.log")
            save(arguments.output, results, lines)
    save(arguments.output, results, lines)
    print(describe(results))


def save(output: Path, results: dict[str, Any], lines: Path) -> None:
    """Write gpu.json and gpu.md."""
    for name in ("plans", "memory", *PROGRAMS, "export"):
        results[name] = read_lines(lines / f"{name}.jsonl")
    (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text(describe(results), encoding="utf-8")


if __name__ == "__main__":
    main()
