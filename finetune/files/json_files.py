"""Write JSON files completely or not at all, and read them with a clear error."""

import json
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if there is no such file.

    Raises:
        FinetuneError: the file is not valid JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FinetuneError(f"{path}: is not valid JSON ({error}); the folder is damaged") from error


def remove_later_lines(file: Path, step: int) -> None:
    """Remove from a file of JSON lines those whose `step` is greater."""
    # Reading line by line ends lines at "\n" only; splitlines would also cut a text at U+2028.
    with file.open(encoding="utf-8") as lines:
        kept = [line for line in lines if json.loads(line)["step"] <= step]
    file.write_text("".join(kept), encoding="utf-8")
