"""Write JSON files completely or not at all, and read them with a clear error."""

import contextlib
import errno
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError

logger = logging.getLogger(__name__)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part of it."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def name_partial(path: Path) -> Path:
    """Return the hidden name under which `write_text` writes a file."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """Write a text so that a reader sees the old file or the new one, never a part of it."""
    partial = name_partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_regular_text(path: Path) -> str:
    """Return the text of a file; a pipe or a device is refused, since it may never end.

    Raises:
        OSError: there is no such file, it is none, or it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is a pipe or a device, no file", str(path))
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if there is no such file.

    Raises:
        FinetuneError: the file is not valid JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FinetuneError(f"{path}: is not valid JSON ({error}); the folder is damaged") from error


@contextlib.contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Say where a block finds JSON of another shape than it was written in that its file is damaged.

    Raises:
        FinetuneError: the block raised an error of a wrong type, key or value.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise FinetuneError(f"{path}: is not as it was written ({detail}); the file is damaged; restore it") from error


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a file of JSON objects with a `step`, each as text and as object; there may be no such file.

    A process that is killed leaves half a line at the end, and a disk that fails may damage any; what is no such object is left out.
    """
    if not file.is_file():
        return
    # Reading line by line ends lines at "\n" only; splitlines would also cut a text at U+2028.
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if line.endswith("\n") and isinstance(content, dict) and isinstance(content.get("step"), int):
                yield line, content


def remove_later_lines(file: Path, step: int) -> None:
    """Remove from a file of JSON lines those whose `step` is greater, and what is no whole line."""
    write_text(file, "".join(line for line, content in read_lines(file) if content["step"] <= step))


def continue_lines(file: Path, step: int, *, is_expected: bool = True) -> None:
    """Prepare a file of JSON lines for a run that goes on behind a step, and say where a file that it must have written is missing."""
    if file.is_file():
        remove_later_lines(file, step)
    elif step and is_expected:
        logger.warning("%s is missing: what it held of the steps until %d is lost", file, step)
