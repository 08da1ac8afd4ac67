"""Check the arguments of the public functions of `import finetune`, before anything is opened."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.errors import ArgumentError, DataError


def require_path(name: str, value: object, expected: str = "a path (str or pathlib.Path)") -> Path:
    """Return an argument as a path; `name` is `function: argument`.

    Raises:
        ArgumentError: it is none, an empty text, or one with a NUL, which no file system takes.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(f"{name}: must be {expected}; found {value!r}")
    return Path(text)


def require_name(name: str, value: object) -> str:
    """Return an argument that names a model as a text; a path stays as it was written.

    Raises:
        ArgumentError: it is neither a text nor a path.
    """
    require_path(name, value, "a run directory, an alias, a hub id or a folder (str or pathlib.Path)")
    return str(value)


def require_files(name: str, value: object) -> list[Path]:
    """Return an argument that is a data file or a list of them.

    Raises:
        ArgumentError: it is neither.
        DataError: it is an empty list.
    """
    if isinstance(value, str | os.PathLike) or not isinstance(value, Sequence):
        return [require_path(name, value, "a data file (str or pathlib.Path), or a list of files")]
    if not value:
        raise DataError(f"{name.partition(':')[0]}: no data file is named; give at least one")
    return [require_path(name, file, "a list of data files (str or pathlib.Path)") for file in value]


def require_list(name: str, value: object, expected: str = "a list of texts") -> tuple[str, ...]:
    """Return an argument that lists texts; a single text is refused, since it would be read letter by letter.

    Raises:
        ArgumentError: it is no list of texts.
    """
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [None]
    texts = tuple(item for item in items if isinstance(item, str))
    if len(texts) < len(items):
        hint = f"; write [{value!r}]" if isinstance(value, str) else ""
        raise ArgumentError(f"{name}: must be {expected}; found {value!r}{hint}")
    return texts


def require_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return an argument that is one of a few texts.

    Raises:
        ArgumentError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}: must be one of {', '.join(choices)}; found {value!r}")
    return value


def require_count(name: str, value: object) -> int:
    """Return an argument that counts something.

    Raises:
        ArgumentError: it is no whole number of 1 or more.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name}: must be a whole number of 1 or more; found {value!r}")
    return value


def require_number(name: str, value: object) -> float:
    """Return an argument that is a number.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ArgumentError(f"{name}: must be a number; found {value!r}")
    return float(value)


def require_turns(name: str, value: object) -> list[Mapping[str, str]]:
    """Return an argument that is a question, or the turns of a conversation, as turns.

    Raises:
        ArgumentError: it is neither, or a text holds half a character, which no tokenizer takes.
    """
    asked = [{"role": "user", "content": value}] if isinstance(value, str) else value
    found = list(asked) if isinstance(asked, Sequence) and not isinstance(asked, bytes) else []
    turns = [turn for turn in found if isinstance(turn, Mapping) and "role" in turn]
    if not turns or len(turns) < len(found):
        raise ArgumentError(f"{name}: must be a question, or a list of turns with role and content; found {value!r}")
    for turn in turns:
        try:
            str(turn.get("content", "")).encode()
        except UnicodeEncodeError as error:
            half = error.object[max(0, error.start - 8) : error.start + 8]
            raise ArgumentError(f"{name}: {half!r} holds half a character; write it as UTF-8") from error
    return turns


def require_flag(name: str, value: object) -> bool:
    """Return an argument that is true or false.

    Raises:
        ArgumentError: it is neither.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}: must be True or False; found {value!r}")
    return value


def require_text(name: str, value: object, example: str) -> str:
    """Return an argument that is a text; the message shows `example`.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(value, str):
        raise ArgumentError(f"{name}: must be a text such as {example!r}; found {value!r}")
    return value


# Options of the command line, and the arguments of the public functions that do the same.
OPTIONS: Mapping[str, str] = {
    "--resume": "resume=True",
    "--force": "force=True",
    "--no-verify": "verify=False",
    "--base-model": "base_model=...",
    "--memory 8GB": "memory='8GB'",
    "--gpu NAME": "gpu='NAME'",
}


def name_option(option: str) -> str:
    """Return an option as both the command line and Python write it, for messages that both show."""
    return f"{option} ({OPTIONS[option]} in Python)"
