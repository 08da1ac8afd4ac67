"""Describe the environment of a run: versions of libraries, machine, and commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")


def describe_environment() -> dict[str, Any]:
    """Return what is needed to repeat a run: the versions, the machine, and the commit of a checkout."""
    versions = {name: _find_version(name) for name in ("yulan-finetune", *_LIBRARIES)}
    return {
        "versions": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "machine": _describe_machine(),
        "commit": _find_commit(),
    }


def _find_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _describe_machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}, {platform.system()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"


def _find_commit() -> str | None:
    """Return the commit of the checkout that this package is imported from, or None for an installed wheel."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
