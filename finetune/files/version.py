"""The version of this kit, and those of the libraries that it was tried with."""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_DISTRIBUTION = "yulan-finetune"
# Of these the kit uses private names or replaces parts (finetune/compat.py).
_WATCHED = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


def read_version() -> str:
    """Return the version of the installed package or, if none is installed, that of the checkout."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def list_other_versions() -> list[str]:
    """Say of each library that the kit depends on closely where a version is installed that it was not tried with.

    Say nothing where the kit itself is not installed, and runs from a checkout.
    """
    try:
        wanted = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []
    installed = [(one, _find_installed(one.name)) for one in wanted if one.name in _WATCHED]
    return [
        f"{one.name} {found} is installed, and the kit was tried with {one.specifier} only, so its numbers may be wrong; mend it by: "
        f"pip install '{one.name}{one.specifier}'"
        for one, found in installed
        if found is not None and not one.specifier.contains(found, prereleases=True)
    ]


def _find_installed(name: str) -> str | None:
    """Return the version of a library, or None where it is absent: what needs it says so when it is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
