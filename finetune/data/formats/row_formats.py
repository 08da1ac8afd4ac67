"""The table of row formats, and how the format of a file is found.

A format is one row of the table and one function in `readers.py`. Detection takes the first format whose required keys a row has,
so formats that require more keys come first. This module imports nothing heavy, so that a recipe is checked quickly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from finetune.data.formats.messages import MARKS, RowError, read_mark, read_switch
from finetune.data.formats.other_shapes import adapt_row
from finetune.data.formats.readers import (
    find_answer_key,
    find_question_key,
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
from finetune.data.formats.rows import Row, RowKind, check_row, join_turns
from finetune.data.formats.turns import list_remarks
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


def describe_label(row: Mapping[str, Any], shape: RowShape) -> str:
    """Return that a row has a label that says neither yes nor no, where a method needs labelled answers; else nothing."""
    if shape != "labelled" or "label" not in row or read_switch(row["label"]) is not None:
        return ""
    return f"; its label is {row['label']!r}, where true or false, or 1 or 0 is expected"


def choose_format(choice: str, columns: Mapping[str, str], row: Mapping[str, Any], place: Place) -> Format:
    """Return the format that `choice` names or, for `auto`, the first whose required keys the row has after renaming.

    Raises:
        DataError: no format fits; the message shows the row's keys and how to map them.
    """
    if choice != "auto":
        return FORMATS[choice]
    try:
        named, _ = adapt_row(rename_columns(row, columns))
    except RowError as error:
        raise DataError(str(error), place, error.kind) from error
    for entry in FORMATS.values():
        # A label that says neither yes nor no is the class of a text, which the answer holds too.
        if named.keys() >= set(entry.required) and (
            entry.row_kind != "labelled" or read_switch(named["label"]) is not None
        ):
            return entry
    raise DataError(_describe_unknown_keys(row), place)


def _describe_unknown_keys(row: Mapping[str, Any]) -> str:
    """Say that the keys of a row fit no format, and what to do."""
    found = f"the keys {', '.join(map(str, row)) or '(none)'} fit no format"
    if several := [key for key, value in row.items() if isinstance(value, list) and len(value) > 1 and key in _ANSWERS]:
        return (
            f"{found}: {several[0]} holds several answers; give each row the best of them as chosen and another as rejected "
            "to learn from pairs, or one as completion"
        )
    if isinstance(row.get("chat"), dict) or "plain_text" in row:
        return f"{found}: the turns stand in a form of their own (MOSS); write them as messages, each with role and content"
    if nested := [key for key, value in row.items() if _holds_rows(value)]:
        return f"{found}: {nested[0]} holds a list of rows; write this list alone into a file"
    expected = "; ".join(f"{entry.name}: {', '.join(entry.required)}" for entry in FORMATS.values())
    return f"{found} ({expected}); map them in the recipe, such as data.columns: {_propose_columns(row)}"


# Under these keys data sets of ranked answers (UltraFeedback, Argilla) hold all of them.
_ANSWERS = ("completions", "responses", "answers", "generations", "candidates")


def read_row(
    entry: Format,
    columns: Mapping[str, str],
    row: Mapping[str, Any],
    place: Place,
    rendered: Rendered = _NOTHING_RENDERED,
    *,
    merge_turns: bool = False,
) -> Row:
    """Read a row and check it: its roles are in order, no text is empty, and it ends with an answer.

    `rendered` says which thoughts the chat template renders, as `list_unused_keys` takes it. `merge_turns` joins turns of one
    speaker.

    Raises:
        DataError: the row has a fault; the message says what was found and what was expected.
    """
    try:
        named, remarks = adapt_row(rename_columns(row, columns))
        if missing := [key for key in entry.required if key not in named]:
            raise RowError(_describe_missing_key(entry, columns, row, columns.get(missing[0], missing[0])))
        unused = list_unused_keys(named, entry.known, rendered)
        read = entry.read(named)
        read = join_turns(read) if merge_turns else read
        check_row(entry.row_kind, read)
        is_trained = _is_trained(named)
    except RowError as error:
        raise DataError(str(error), place, error.kind) from error
    unused = (*unused, *_list_hidden_keys(row, columns)) if columns else unused
    remarks = (*remarks, *list_remarks([*read.messages, *read.chosen]))
    if not (unused or remarks) and is_trained:
        return read
    return replace(read, unused=unused, remarks=remarks, is_trained=is_trained)


def _describe_missing_key(entry: Format, columns: Mapping[str, str], row: Mapping[str, Any], missing: str) -> str:
    """Say that a row lacks a key of its file's format, and which other format it has, if it has one."""
    found = f"has no {missing!r}, which the format {entry.name} needs; found {', '.join(map(str, row)) or 'nothing'}"
    try:
        other = choose_format("auto", columns, row, Place(""))
    except DataError:
        return found
    return f"{found}: that is {other.name}, and the rows of one file must have one format; put them into another file"


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


def _propose_columns(row: Mapping[str, Any]) -> str:
    """Return a mapping of a row's keys that would make it a conversation, or a pair, by the names of its keys."""
    keys = [str(key) for key in row]
    if turns := next((key for key in keys if _holds_turns(row[key])), None):
        return f"{{messages: {turns}}}"
    rejected = next((key for key in keys if "rejected" in key.lower()), None)
    chosen = next((key for key in keys if "chosen" in key.lower()), None)
    question = find_question_key({key: row[key] for key in row if key not in (chosen, rejected)}, "QUESTION_KEY")
    answer = find_answer_key({key: row[key] for key in row if key != rejected}, question, "ANSWER_KEY")
    taken = (question, answer, chosen, rejected)
    names = [(_OTHER_NAMES.get(key.lower()), key) for key in keys if key not in taken]
    others = [f"{ours}: {key}" for ours, key in names if ours is not None and ours != key]
    if rejected is None:
        answers = [f"completion: {answer}"]
    else:
        answers = [f"chosen: {chosen or answer}", f"rejected: {rejected}"]
    return f"{{{', '.join([*others, f'prompt: {question}', *answers])}}}"


def _holds_turns(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool(first.keys() & {"role", "from", "human"})


def _holds_rows(value: object) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict) or _holds_turns(value):
        return False
    return any(all(key in value[0] for key in entry.required) for entry in FORMATS.values())


# What stands beside question and answer in the files of others, also where its name begins with a capital letter.
_OTHER_NAMES = {
    **dict.fromkeys(("system_prompt", "system_message", "meta_instruction"), "system"),
    "context": "input",
    **{name: name for name in _QUESTION},
}
