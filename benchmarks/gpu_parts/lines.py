"""Results as lines of JSON: each is written as soon as it is known, so that a part that runs out of time keeps what it has."""

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one result."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all results; a part that was stopped may have left half a line, which is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def record(path: Path, name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
    """Measure and write the result; what fails is written with its reason, and the next measurement goes on."""
    try:
        values = dict(measure())
    except Exception as error:
        traceback.print_exc()
        values = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
    write_line(path, {"name": name, **values})
