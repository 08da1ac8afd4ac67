"""Read what `--set section.key=value` gives: its value, and the paths in it, which are relative to the current folder."""

from pathlib import Path
from typing import Any

from finetune.data.reading.patterns import expand_pattern, has_signs
from finetune.files.resources import find_resource_folder
from finetune.recipe.yaml_loader import parse_scalar, parse_yaml

# Keys whose paths are looked for in the recipe's folder too, where a recipe file gives them.
_PATH_KEYS = ("data.train", "data.eval", "data.template", "optimizer.states")
_SOURCES = "data.sources"


def read_override(key: str, text: str, recipe: Path) -> Any:
    """Return the value of `--set key=text` for a recipe file.

    A text that is no list, no mapping and not quoted is one scalar to its end: `#` and `: ` are part of it. Relative paths are
    looked for in the current folder. Where there is no such file, those without `./` are then looked for in the folder of
    `recipe`, unless that is a shipped one.

    Raises:
        RecipeError: a list, a mapping or a quoted text is not YAML.
    """
    name = f"--set {key}={text}"
    bare = text.strip()
    is_quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    value = parse_yaml(text, name) if bare.startswith(("[", "{")) or is_quoted else parse_scalar(bare, name)
    return _anchor_value(key, value, may_fall_back=find_resource_folder("recipes") not in recipe.resolve().parents)


def _anchor_value(key: str, value: Any, *, may_fall_back: bool) -> Any:
    if key == _SOURCES and isinstance(value, dict):
        return {name: _anchor(inner, may_fall_back) for name, inner in value.items()}
    if key not in _PATH_KEYS and not key.startswith(f"{_SOURCES}."):
        return value
    return (
        [_anchor(item, may_fall_back) for item in value] if isinstance(value, list) else _anchor(value, may_fall_back)
    )


def _anchor(value: Any, may_fall_back: bool) -> Any:
    """Return a path, or a source that has one, with the current folder before it; anything else stays as it is."""
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": _anchor(value["path"], may_fall_back)}
    if not isinstance(value, str) or Path(value).expanduser().is_absolute():
        return value
    path = Path.cwd() / value
    exists = bool(expand_pattern(path)[1]) if has_signs(path) else path.exists()
    is_path = "/" in value or Path(value).suffix != ""
    if exists or value.startswith(("./", "../")) or (is_path and not may_fall_back):
        return str(path)
    return value
