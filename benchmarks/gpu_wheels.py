"""Collect, as wheels, what a machine with PyTorch and no network lacks for gpu.py.

    python benchmarks/gpu_wheels.py FOLDER [--python 3.12] [--cuda 130]

The versions are those of constraints.txt. PyTorch, CUDA and packages that every such machine has beside them are left out, and of
bitsandbytes only the library for one CUDA version stays, so that the folder has less than 40 MB without pyarrow. Copy it to that
machine and give it to gpu.py as `--wheels FOLDER`.
"""

import argparse
import subprocess
import sys
import zipfile
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
PLATFORMS = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def read_versions() -> dict[str, str]:
    """Return the versions of constraints.txt by package, in lower case."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])
    return {name.lower(): version for name, version in pairs}


def download(folder: Path, names: list[str], python: str) -> None:
    """Download one wheel for each package, without what it depends on."""
    versions = read_versions()
    wanted = [f"{name}=={versions[name.lower()]}" if name.lower() in versions else name for name in names]
    platforms = [option for platform in PLATFORMS for option in ("--platform", f"{platform}_x86_64")]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, *target, *wanted], check=True)


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Write bitsandbytes again with the libraries of the processor and of one CUDA version only."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            is_library = item.filename.endswith(".so")
            if not is_library or item.filename.endswith(("_cpu.so", f"_cuda{cuda}.so")):
                target.writestr(item, source.read(item))
    smaller.replace(wheel)


def main() -> None:
    """Collect the wheels and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="130", help="the CUDA version of that machine's PyTorch, such as 130")
    parser.add_argument("--also", nargs="*", default=[], help="more packages, such as pyarrow")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    download(arguments.folder, [*PACKAGES, *arguments.also], arguments.python)
    for wheel in arguments.folder.glob("bitsandbytes-*.whl"):
        keep_one_library(wheel, arguments.cuda)
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(arguments.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 1e6:7.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:7.1f} MB in all")


if __name__ == "__main__":
    main()
