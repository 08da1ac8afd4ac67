"""Results as lines of JSON: each is written as soon as it is known, so that a part that runs out of time keeps what it has."""

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one result."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write results in place of whatever the file holds."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the last result of every name, in the order of the first; half a line, of a part that was stopped, is left out."""
    if not path.is_file():
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        found[row["name"]] = row
    return list(found.values())


def is_measured(row: Mapping[str, Any]) -> bool:
    """Say whether a result holds figures, and not the reason why there are none."""
    return "error" not in row and "skipped" not in row


def record(path: Path, name: str, measure: Callable[[], Mapping[str, Any]], only_missing: bool = False) -> None:
    """Measure and write the result; what fails is written with its reason, and the next measurement goes on.

    With `only_missing`, what the file holds already is not measured again.
    """
    if only_missing and any(row["name"] == name and is_measured(row) for row in read_lines(path)):
        return
    try:
        values = dict(measure())
    except Exception as error:
        traceback.print_exc()
        values = {"error": explain(error)}
    write_line(path, {"name": name, **values})


def explain(error: BaseException) -> str:
    """Return the kind and the message of an error on one line that a table can hold."""
    return " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())[:300]
