"""The table of row formats: how a raw row becomes a conversation, a preference pair, a labelled answer, a prompt or a text.

It is pure Python, so that a recipe can be checked without importing anything heavy.
A format is one function and one row of the table; detection takes the first whose keys a row has, so the narrow ones come first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.data.formats.messages import (
    RowError,
)
from finetune.data.formats.readers import (
    read_alpaca_row,
    read_labelled_row,
    read_openai_row,
    read_plain_text_row,
    read_preference_row,
    read_prompt_completion_row,
    read_prompt_row,
    read_sharegpt_row,
    read_tokens_row,
)
from finetune.data.formats.rows import Row, RowKind, check_row
from finetune.data.settings import RowShape
from finetune.errors import DataError


@dataclass(frozen=True)
class Format:
    """One format: its row kind, the keys it needs and may have, and the function that reads a row."""

    name: str
    row_kind: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]


FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "sharegpt_preference",
            "preference",
            ("conversations", "chosen", "rejected"),
            ("system", "tools"),
            read_preference_row,
        ),
        Format("preference", "preference", ("chosen", "rejected"), ("prompt", "tools"), read_preference_row),
        Format("labelled_messages", "labelled", ("messages", "label"), ("tools",), read_labelled_row),
        Format("labelled", "labelled", ("prompt", "completion", "label"), (), read_labelled_row),
        Format("messages", "conversation", ("messages",), ("tools",), read_openai_row),
        Format("sharegpt", "conversation", ("conversations",), ("system", "tools"), read_sharegpt_row),
        Format("alpaca", "conversation", ("instruction", "output"), ("input", "system", "history"), read_alpaca_row),
        Format("prompt_completion", "conversation", ("prompt", "completion"), ("tools",), read_prompt_completion_row),
        Format("text", "text", ("text",), (), read_plain_text_row),
        Format("tokens", "tokens", ("input_ids",), (), read_tokens_row),
        Format("prompt", "prompt", ("prompt",), ("answer",), read_prompt_row),
    )
}


# The kinds of rows that each shape can be made of: a pair serves supervised training by its chosen answer, and KTO by both.
SHAPES: Mapping[RowShape, tuple[RowKind, ...]] = {
    "sequence": ("conversation", "preference", "labelled", "text", "tokens"),
    "pair": ("preference",),
    "labelled": ("labelled", "preference"),
    "prompt": ("prompt", "conversation", "preference", "labelled"),
}
_SHAPE_NEEDS: Mapping[RowShape, str] = {
    "sequence": "an answer to each prompt",
    "pair": "pairs: chosen and rejected, with or without a prompt",
    "labelled": "labelled answers (prompt, completion, label: true or false), or pairs (chosen and rejected)",
    "prompt": "prompts, or rows that hold one",
}


def describe_wrong_kind(entry: Format, shape: RowShape) -> str | None:
    """Return what a method that trains on `shape` needs instead of a format, or None where the format fits."""
    if entry.row_kind in SHAPES[shape]:
        return None
    return (
        f"holds rows of the format {entry.name} ({', '.join(entry.required)}); this method needs {_SHAPE_NEEDS[shape]}"
    )


def choose_format(choice: str, columns: Mapping[str, str], row: Mapping[str, Any], where: str) -> Format:
    """Return the named format, or for `auto` the first whose keys the row has after renaming.

    Raises:
        DataError: no format fits; the message shows the keys and how to map them.
    """
    names = set(rename_columns(row, columns))
    if choice != "auto":
        return FORMATS[choice]
    for entry in FORMATS.values():
        if set(entry.required) <= names:
            return entry
    expected = "; ".join(f"{entry.name}: {', '.join(entry.required)}" for entry in FORMATS.values())
    raise DataError(
        f"{where}: the keys {', '.join(map(str, row)) or '(none)'} fit no format ({expected}); "
        f"map them in the recipe, such as data.columns: {_propose_columns(row)}"
    )


def read_row(entry: Format, columns: Mapping[str, str], row: Mapping[str, Any], where: str) -> Row:
    """Return a row, checked: roles in order, no empty text, an answer at the end.

    Raises:
        DataError: with the file, the line, what was found and what was expected.
    """
    named = rename_columns(row, columns)
    if missing := [key for key in entry.required if key not in named]:
        origin = {key: columns.get(key, key) for key in missing}
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"{where}: has no {origin[missing[0]]!r}, which the format {entry.name} needs; found {found}")
    try:
        read = entry.read(named)
        check_row(entry.row_kind, read)
    except RowError as error:
        raise DataError(f"{where}: {error}") from error
    return read


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give a row the names that a format knows; `columns` maps our name to the file's."""
    renamed = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken = set(columns.values())
    return {**{key: value for key, value in row.items() if key not in taken}, **renamed}


_QUESTION_WORDS = ("question", "query", "instruction", "input", "prompt", "problem", "user", "text")
_ANSWER_WORDS = ("answer", "response", "output", "completion", "solution", "assistant", "target", "reply")


def _propose_columns(row: Mapping[str, Any]) -> str:
    keys = [str(key) for key in row]
    question = next((key for word in _QUESTION_WORDS for key in keys if word in key.lower()), "QUESTION_KEY")
    answer = next(
        (key for word in _ANSWER_WORDS for key in keys if word in key.lower() and key != question), "ANSWER_KEY"
    )
    return f"{{prompt: {question}, completion: {answer}}}"
