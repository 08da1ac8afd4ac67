"""The table of row formats, and how the format of a file is found.

A format is one row of the table and one function in `readers.py`. Detection takes the first format whose required keys a row has,
so formats that require more keys come first. This module imports nothing heavy, so that a recipe is checked quickly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from finetune.data.formats.messages import MARKS, RowError, read_mark
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
from finetune.data.formats.row_keys import Rendered, list_unused_keys
from finetune.data.formats.rows import Row, RowKind, check_row
from finetune.data.settings import RowShape
from finetune.errors import DataError, Place


@dataclass(frozen=True)
class Format:
    """One format: the kind of its rows, the keys that every row needs or may have, and the function that reads a row."""

    name: str
    row_kind: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]

    @cached_property
    def known(self) -> frozenset[str]:
        """The keys that the format reads; each may also have a mark that says whether the row is trained."""
        return frozenset({*self.required, *self.optional, *_ROW_MARKS})


# A row's `loss` is often a figure that somebody measured, so only `loss: true` or `false` is a mark.
_ROW_MARKS = tuple(key for key in MARKS if key != "loss")
_CHAT = ("system", "tools", "functions")
_QUESTION = (*_CHAT, "input", "history")

_NOTHING_RENDERED: Rendered = {}

FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "sharegpt_preference",
            "preference",
            ("conversations", "chosen", "rejected"),
            (*_QUESTION, "prompt", "instruction"),
            read_preference_row,
        ),
        Format(
            "preference",
            "preference",
            ("chosen", "rejected"),
            (*_QUESTION, "prompt", "instruction"),
            read_preference_row,
        ),
        Format("labelled_messages", "labelled", ("messages", "label"), _CHAT, read_labelled_row),
        Format("labelled", "labelled", ("prompt", "completion", "label"), _QUESTION, read_labelled_row),
        Format("messages", "conversation", ("messages",), _CHAT, read_openai_row),
        Format("sharegpt", "conversation", ("conversations",), _CHAT, read_sharegpt_row),
        Format("alpaca", "conversation", ("instruction", "output"), _QUESTION, read_alpaca_row),
        Format("prompt_completion", "conversation", ("prompt", "completion"), _QUESTION, read_prompt_completion_row),
        Format("text", "text", ("text",), (), read_plain_text_row),
        Format(
            "tokens",
            "tokens",
            ("input_ids",),
            ("labels", "attention_mask", "assistant_masks", "completion_mask"),
            read_tokens_row,
        ),
        Format("prompt", "prompt", ("prompt",), (*_QUESTION, "answer"), read_prompt_row),
    )
}


# The kinds of rows that each shape can be made from. Supervised training uses the chosen answer of a pair, KTO both answers.
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
    """Return why a method that trains on `shape` cannot use a format and what it needs, or None where it can."""
    if entry.row_kind in SHAPES[shape]:
        return None
    return (
        f"holds rows of the format {entry.name} ({', '.join(entry.required)}); this method needs {_SHAPE_NEEDS[shape]}"
    )


def choose_format(choice: str, columns: Mapping[str, str], row: Mapping[str, Any], place: Place) -> Format:
    """Return the format that `choice` names or, for `auto`, the first whose required keys the row has after renaming.

    Raises:
        DataError: no format fits; the message shows the row's keys and how to map them.
    """
    names = set(rename_columns(row, columns))
    if choice != "auto":
        return FORMATS[choice]
    for entry in FORMATS.values():
        if set(entry.required) <= names:
            return entry
    expected = "; ".join(f"{entry.name}: {', '.join(entry.required)}" for entry in FORMATS.values())
    raise DataError(
        f"the keys {', '.join(map(str, row)) or '(none)'} fit no format ({expected}); "
        f"map them in the recipe, such as data.columns: {_propose_columns(row)}",
        place,
    )


def read_row(
    entry: Format,
    columns: Mapping[str, str],
    row: Mapping[str, Any],
    place: Place,
    rendered: Rendered = _NOTHING_RENDERED,
) -> Row:
    """Read a row and check it: its roles are in order, no text is empty, and it ends with an answer.

    `rendered` says which thoughts the chat template renders, as `list_unused_keys` takes it.

    Raises:
        DataError: the row has a fault; the message says what was found and what was expected.
    """
    named = rename_columns(row, columns)
    if missing := [key for key in entry.required if key not in named]:
        theirs = columns.get(missing[0], missing[0])
        found = ", ".join(map(str, row)) or "nothing"
        fault = f"has no {theirs!r}, which the format {entry.name} needs; found {found}"
        raise DataError(fault, place)
    try:
        unused = list_unused_keys(named, entry.known, rendered)
        read = entry.read(named)
        check_row(entry.row_kind, read)
        is_trained = _is_trained(named)
    except RowError as error:
        raise DataError(str(error), place, error.kind) from error
    unused = (*unused, *_list_hidden_keys(row, columns)) if columns else unused
    return replace(read, unused=unused, is_trained=is_trained) if unused or not is_trained else read


def _is_trained(row: Mapping[str, Any]) -> bool:
    marks = {key: row[key] for key in MARKS if key in row and (key != "loss" or isinstance(row[key], bool))}
    return read_mark(marks, "the row") is not False if marks else True


def _list_hidden_keys(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Return the keys of a row that `columns` gives to the values of other keys."""
    taken = set(columns.values())
    return [ours for ours, theirs in columns.items() if theirs in row and ours in row and ours not in taken]


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Rename a row's keys to those of its format; `columns` maps the format's keys to the file's."""
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
