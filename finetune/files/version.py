"""The version of this kit."""

import tomllib
from importlib import metadata
from pathlib import Path

_DISTRIBUTION = "yulan-finetune"


def read_version() -> str:
    """Return the version of the installed package or, if none is installed, that of the checkout."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
