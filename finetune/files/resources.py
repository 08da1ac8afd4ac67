"""Where the shipped recipes and templates are, in a checkout and in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def find_resource_folder(name: str) -> Path:
    """Return the folder `recipes` or `templates`: inside the package where installed, beside it in a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def list_templates() -> dict[str, Path]:
    """Return the shipped chat templates: name -> file."""
    return {path.stem: path for path in sorted(find_resource_folder("templates").glob("*.jinja"))}


def list_recipes() -> dict[str, Path]:
    """Return the shipped recipes: name -> file."""
    return {path.stem: path for path in sorted(find_resource_folder("recipes").glob("*.yaml"))}


def find_demo_data(name: str) -> Path:
    """Return a bundled data file, such as `demo.jsonl`."""
    return find_resource_folder("recipes") / "data" / name
