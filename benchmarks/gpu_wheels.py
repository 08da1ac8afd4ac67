"""Collect, as wheels, what a machine with PyTorch and no network lacks for gpu.py.

    python benchmarks/gpu_wheels.py FOLDER [--python 3.12] [--cuda 130] [--unsloth]

The versions are those of constraints.txt. PyTorch, CUDA and packages that every such machine has beside them are left out, and of
bitsandbytes only the library for one CUDA version stays, so that the folder has less than 40 MB without pyarrow. Copy it to that
machine and give it to gpu.py as `--wheels FOLDER`. With `--unsloth` the folder FOLDER/unsloth holds what Unsloth needs beside that: it
needs older versions of transformers, TRL and datasets than the kit, so gpu.py lets only its process find them.
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Machines with PyTorch 2.11 have these, or need no newer ones: pyarrow alone has 55 MB. `--also` adds more.
PACKAGES = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "dill",
    "fsspec",
    "ftfy",
    "gguf",
    "hf-xet",
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "iniconfig",
    "liger-kernel",
    "multiprocess",
    "peft",
    "pluggy",
    "pytest",
    "pytest-xdist",
    "execnet",
    "rensa",
    "safetensors",
    "tokenizers",
    "transformers",
    "trl",
    "truststore",
    "typer",
    "wcwidth",
    "xxhash",
    "idna",
    "click",
]
# Packages that constraints.txt does not hold.
OTHER_VERSIONS = {"liger-kernel": "0.8.5"}
# Unsloth 2026.10.9 takes transformers up to 5.17.0, TRL up to 1.15.0 and datasets before 5; those need huggingface_hub before 2 and
# fsspec up to 2026.2.0. It also names torchao, diffusers, hf_transfer, msgspec and xformers, and is imported and trains without them: the
# xformers of PyPI is built for CUDA 12, and without it Unsloth uses PyTorch's attention.
UNSLOTH = [
    "unsloth==2026.10.9",
    "unsloth_zoo==2026.10.9",
    "transformers==5.17.0",
    "trl==1.15.0",
    "datasets==4.8.5",
    "huggingface_hub==1.33.0",
    "fsspec==2026.2.0",
    "httpx==0.28.1",
    "httpcore==1.0.9",
    "h11==0.16.0",
    "cut_cross_entropy==25.1.1",
    "tyro==1.0.17",
    "docstring_parser==0.18.0",
    "typeguard==4.6.1",
]
# A program with a page for the browser, 26 of the wheel's 29 MB, that the library does not import.
UNSLOTH_PROGRAM = ("studio/", "unsloth_cli/")
PLATFORMS = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def read_versions() -> dict[str, str]:
    """Return the versions of constraints.txt by package, in lower case."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])
    return OTHER_VERSIONS | {name.lower(): version for name, version in pairs}


def download(folder: Path, names: list[str], python: str) -> None:
    """Download one wheel for each package, without what it depends on."""
    versions = read_versions()
    wanted = [f"{name}=={versions[name.lower()]}" if name.lower() in versions else name for name in names]
    platforms = [option for platform in PLATFORMS for option in ("--platform", f"{platform}_x86_64")]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, *target, *wanted]).returncode:
        raise SystemExit(f"{folder}: not all wheels are there; the lines above say what pip could not get")


def keep_files(wheel: Path, is_kept: Callable[[str], bool]) -> None:
    """Write a wheel again with some of its files only."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            if is_kept(item.filename):
                target.writestr(item, source.read(item))
    smaller.replace(wheel)


def keep_libraries(wheel: Path, cuda: str) -> None:
    """Keep only the libraries for the processor and for one CUDA version in the wheel of bitsandbytes."""
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    libraries = ("_cpu.so", f"_cuda{cuda}.so")
    if not any(name.endswith(libraries[1]) for name in names):
        known = sorted(name.split("_cuda")[1].removesuffix(".so") for name in names if "_cuda" in name)
        raise SystemExit(f"--cuda {cuda}: {wheel.name} has no library for it; it has {', '.join(known)}")
    keep_files(wheel, lambda name: not name.endswith(".so") or name.endswith(libraries))


def print_sizes(folder: Path) -> float:
    """Print the size of every wheel of a folder, and return their sum in MB."""
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:7.1f} MB  {name}")
    print(f"{sum(sizes.values()):7.1f} MB in {folder}")
    return sum(sizes.values())


def collect(folder: Path, names: list[str], python: str) -> None:
    """Make a folder and download into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder}: cannot be made a folder: {error.strerror}") from error
    download(folder, names, python)


def main() -> None:
    """Collect the wheels and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="130", help="the CUDA version of that machine's PyTorch, such as 130")
    parser.add_argument("--also", nargs="*", default=[], help="more packages, such as pyarrow")
    parser.add_argument("--unsloth", action="store_true", help="what Unsloth needs, in a folder inside")
    arguments = parser.parse_args()
    collect(arguments.folder, [*PACKAGES, *arguments.also], arguments.python)
    for wheel in arguments.folder.glob("bitsandbytes-*.whl"):
        keep_libraries(wheel, arguments.cuda)
    size = print_sizes(arguments.folder)
    if arguments.unsloth:
        inner = arguments.folder / "unsloth"
        collect(inner, UNSLOTH, arguments.python)
        for wheel in inner.glob("unsloth-*.whl"):
            keep_files(wheel, lambda name: not name.startswith(UNSLOTH_PROGRAM))
        print(f"{size + print_sizes(inner):7.1f} MB in all")


if __name__ == "__main__":
    main()
