"""Measure on an NVIDIA GPU what the kit says of one: tests, memory against the plan, speed beside TRL and Unsloth, export and chat.

    python benchmarks/gpu.py [--wheels FOLDER] [--output DIR] [--parts tests,memory,speed,plain,auto,unsloth,export,roomy,large]
                             [--missing] [--rehearse]

It makes a random checkpoint of YuLan-Mini's real sizes, so nothing is downloaded. Every part is a process of its own with a time
limit, all together take 8 minutes at most, and every result is saved as soon as it is known. Without a GPU it says so and ends;
`--rehearse` runs every part with nano's sizes on the processor. The results are gpu.json and gpu.md beside this file, or in `--output`,
and gpu.log holds the end of what each part said.
A later call on the same card with the same versions adds to them: `--parts` names what runs again, `--missing` measures only what they
do not hold yet. `--wheels` names a folder of gpu_wheels.py, for a machine that has PyTorch and no network.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_parts.report import describe
from gpu_parts.running import Command, Part, Place, run_parts
from gpu_parts.store import Store, hash_sources

HERE = Path(__file__).parent
ROOT = HERE.parent

# A card of this size holds several of the runs at once; each counts only the memory of its own process.
SHARED_CARD, SHARES = 70 * 2**30, 3
REHEARSAL_PATIENCE = 5


def list_parts(folder: Path, options: Sequence[str], card_bytes: int, unsloth: Mapping[str, str]) -> list[Part]:
    """Return the parts, the most important first, as the last ones may find no time left."""

    def child(script: str, name: str, *more: str) -> Command:
        paths = (str(folder / "base"), str(folder / "results" / f"{name}.jsonl"))
        return (sys.executable, "-W", "ignore", str(HERE / "gpu_parts" / script), *paths, *more, *options)

    def program(name: str, limit: int, *more: str) -> Part:
        return Part(name, (child("speed.py", name, "--wait", "--program", *more),), limit, (name,), waits=True)

    workers = max(2, min(6, (os.cpu_count() or 1) // 2))
    pytest = (
        "-m",
        "pytest",
        "-q",
        "-W",
        "default",
        "-n",
        str(workers),
        "-p",
        "no:cacheprovider",
        "-rf",
        "tests/gpu/test_gpu.py",
    )
    tests = (sys.executable, *pytest)
    shares = SHARES if card_bytes >= SHARED_CARD else 1
    claims = ("--claims", tempfile.mkdtemp(dir=folder))
    memory = (*[child("memory.py", "memory", *claims)] * shares, child("plans.py", "plans"))
    unsloth_command = child("unsloth_speed.py", "unsloth", "--wait")
    return [
        Part("tests", (tests,), 100, ("tests",)),
        Part("memory", memory, 185 if shares > 1 else 240, ("memory", "plans")),
        program("speed", 50, "ours"),
        program("plain", 50, "plain TRL"),
        program("auto", 85, "ours, speed auto"),
        Part("unsloth", (unsloth_command,), 80, ("unsloth",), waits=True, environment=unsloth),
        Part("export", (child("export_chat.py", "export"),), 60, ("export",)),
        program("roomy", 60, "ours, no checkpointing", "--settings", "2"),
        Part("large", (child("memory.py", "large", *claims, "--alone"),), 60, ("large",)),
    ]


def join_checks(parts: list[Part], card_bytes: int) -> list[Part]:
    """Let tests and memory run at the same time where the card is large enough; neither measures time."""
    first = [part for part in parts if part.name in ("tests", "memory")]
    if card_bytes < SHARED_CARD or len(first) < 2:
        return parts
    commands = tuple(command for part in first for command in part.commands)
    writes = tuple(name for part in first for name in part.writes)
    return [Part("checks", commands, max(part.limit for part in first), writes), *parts[2:]]


def add_base(parts: list[Part], make: Command) -> list[Part]:
    """Let the checkpoint be made beside the first part, if that one waits for it or does not need it, or before."""
    if parts and parts[0].name in ("checks", "tests", "memory"):
        return [replace(parts[0], commands=(make, *parts[0].commands)), *parts[1:]]
    return [Part("base", (make,), 60, ()), *parts]


def install_wheels(wheels: Path, folder: Path) -> Path:
    """Install a folder of wheels, without what lies in folders inside it; return where."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # pip leaves what is there as it is
        if not (files := sorted(wheels.glob("*.whl"))):
            raise SystemExit(f"{wheels}: there are no wheels; benchmarks/gpu_wheels.py collects them")
        if subprocess.run([*pip, "--target", str(unfinished), *map(str, files)]).returncode:
            raise SystemExit(f"{wheels}: pip cannot install these wheels; the lines above say why")
        unfinished.rename(folder)
    return folder


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
    return found | {"python": platform.python_version()}


def make_environments(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Install the wheels, and return the environment of all parts and what Unsloth's has beside it.

    Unsloth needs older libraries than the kit, so its own wheels are found first, by its process only.
    """
    sites = [install_wheels(arguments.wheels, folder / "site")] if arguments.wheels else []
    given = arguments.unsloth_wheels or (arguments.wheels / "unsloth" if arguments.wheels else None)
    older = [install_wheels(given, folder / "unsloth_site")] if given and given.is_dir() else []
    if arguments.unsloth_wheels and not older:
        raise SystemExit(f"--unsloth-wheels {given}: there is no such folder")
    path = [*sites, *filter(None, [os.environ.get("PYTHONPATH")]), HERE, ROOT]
    environment = {
        # Several processes with a thread for every core each would wait for one another.
        "OMP_NUM_THREADS": "1" if arguments.rehearse else "4",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "FINETUNE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "GPU_TEST_RESULTS": str(folder / "results" / "tests.jsonl"),
    }
    if arguments.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GPU_TEST_REHEARSAL": "1"}
    if arguments.missing:
        environment["GPU_TEST_MISSING"] = "1"
    # Nothing is sent, and what it compiles goes with the folder.
    unsloth = {
        "PYTHONPATH": os.pathsep.join(map(str, [*older, *path])),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth_compiled"),
        "HF_HOME": str(folder / "unsloth_compiled" / "hub"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "unsloth_compiled" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "unsloth_compiled" / "triton"),
    }
    return environment, unsloth


def choose_parts(arguments: argparse.Namespace, parts: list[Part], card_bytes: int) -> list[Part]:
    """Return the parts that were asked for, and before them the one that makes the checkpoint, if it is not there."""
    names = [part.name for part in parts]
    wanted = arguments.parts.split(",") if arguments.parts else names
    if unknown := sorted({*wanted} - {*names}):
        raise SystemExit(f"--parts {arguments.parts}: {', '.join(unknown)} is none of {', '.join(names)}")
    return join_checks([part for part in parts if part.name in wanted], card_bytes)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the checkpoint, run the parts that were asked for, and write the results whenever there are new ones."""
    # A rehearsal shares a processor with whatever else runs there.
    patience = arguments.patience * (REHEARSAL_PATIENCE if arguments.rehearse else 1)
    end = time.monotonic() + 60 * arguments.minutes * patience
    choose_parts(
        arguments, list_parts(folder, [], 0, {}), 0
    )  # a name that is none is said before anything is installed
    environment, unsloth = make_environments(arguments, folder)
    device = ask_device(environment)
    if not device["card"] and not arguments.rehearse:
        print("no NVIDIA GPU is visible, so nothing is measured; --rehearse runs every part on the processor")
        return
    options = ["--rehearse"] * arguments.rehearse
    missing = ["--missing"] * arguments.missing
    parts = list_parts(folder, [*options, *missing], device["memory"], unsloth)
    parts = choose_parts(arguments, parts, device["memory"])
    if not (folder / "base" / "rows").is_dir():
        make = (
            sys.executable,
            "-W",
            "ignore",
            str(HERE / "gpu_parts" / "real_base.py"),
            str(folder / "base"),
            *options,
        )
        parts = add_base(parts, make)
    parts = [replace(part, limit=part.limit * patience) for part in parts]
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    store = Store(make_folder("--output", arguments.output), folder / "results", hash_sources(ROOT), device)
    store.begin([name for part in parts for name in part.writes], keep=arguments.missing)
    run_parts(parts, Place(ROOT, environment, logs, arguments.output / "gpu.log"), end, store.save)
    print(describe(store.results))


def read_positive(text: str) -> float:
    """Read a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0; found {text!r}")


def make_folder(option: str, folder: Path) -> Path:
    """Make the folder of an option, if it is not there, and return its whole path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{option} {folder}: cannot be made a folder: {error.strerror}") from error
    return folder.resolve()


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wheels", type=Path, help="a folder of gpu_wheels.py, installed first")
    parser.add_argument(
        "--unsloth-wheels", type=Path, help="wheels for the part unsloth; default: unsloth inside --wheels"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where gpu.json and gpu.md go")
    parser.add_argument("--parts", default="", help="what to measure; default: all")
    parser.add_argument("--missing", action="store_true", help="measure only what the results do not hold yet")
    parser.add_argument("--keep", type=Path, help="keep checkpoint and wheels in this folder, for another call")
    parser.add_argument("--minutes", type=read_positive, default=7.8, help="how long all parts may take")
    parser.add_argument(
        "--patience", type=read_positive, default=1.0, help="multiply the time limits, for a slow machine"
    )
    parser.add_argument("--rehearse", action="store_true", help="every part with nano's sizes, on the processor")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what runs is stopped too
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder("--keep", arguments.keep or Path(temporary))
        measure(arguments, folder)


if __name__ == "__main__":
    main()
