"""The table of row formats: how a raw row becomes a conversation.

It is pure Python, so that a recipe can be checked without importing anything heavy. A format to come (ShareGPT, preference pairs,
plain text) is one more function and one more row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import DataError, find_close_match

ROLES = ("system", "user", "assistant")
RowKind = Literal["conversation", "preference", "labelled", "text"]
Message = dict[str, str]


@dataclass(frozen=True)
class Format:
    """One format: its row kind, the keys it needs and may have, and the function that reads a row."""

    name: str
    row_kind: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Message]]


class _RowError(Exception):
    """What is wrong with a row; the caller knows where it stands."""


def _read_messages(row: Mapping[str, Any]) -> list[Message]:
    return [_read_message(message, number) for number, message in enumerate(_read_list(row["messages"], "messages"), 1)]


def _read_message(message: object, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise _RowError(f"{where} is {_describe(message)}; expected an object with role and content")
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise _RowError(f"{where} has no {missing[0]!r}; found {', '.join(map(str, message)) or 'nothing'}")
    role = message["role"]
    if role not in ROLES:
        hint = find_close_match(str(role), ROLES) or {"human": "user", "gpt": "assistant", "bot": "assistant"}.get(
            str(role)
        )
        raise _RowError(
            f"{where} has the role {role!r}; expected {', '.join(ROLES)}"
            + (f" (did you mean {hint!r}?)" if hint else "")
        )
    return {"role": str(role), "content": _read_text(message["content"], f"the content of {where}")}


def _read_alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _read_text(row["system"], "system")})
    for number, turn in enumerate(_read_list(row.get("history") or [], "history"), 1):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise _RowError(f"turn {number} of history is {_describe(turn)}; expected a question and an answer")
        messages += _pair(turn[0], turn[1], f"turn {number} of history")
    question = _read_text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n" + _read_text(row["input"], "input")
    return messages + _pair(question, row["output"], "output")


def _read_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _read_messages({"messages": [*prompt, *completion]})
    return _pair(prompt, completion, "completion")


def _pair(question: object, answer: object, name: str) -> list[Message]:
    return [
        {"role": "user", "content": _read_text(question, "the question")},
        {"role": "assistant", "content": _read_text(answer, name)},
    ]


FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format("messages", "conversation", ("messages",), (), _read_messages),
        Format("alpaca", "conversation", ("instruction", "output"), ("input", "system", "history"), _read_alpaca),
        Format("prompt_completion", "conversation", ("prompt", "completion"), (), _read_prompt_completion),
    )
}


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


def read_row(entry: Format, columns: Mapping[str, str], row: Mapping[str, Any], where: str) -> list[Message]:
    """Return a row's messages, checked: roles in order, no empty text, an answer at the end.

    Raises:
        DataError: with the file, the line, what was found and what was expected.
    """
    named = rename_columns(row, columns)
    if missing := [key for key in entry.required if key not in named]:
        origin = {key: columns.get(key, key) for key in missing}
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"{where}: has no {origin[missing[0]]!r}, which the format {entry.name} needs; found {found}")
    try:
        messages = entry.read(named)
        _check_order(messages)
    except _RowError as error:
        raise DataError(f"{where}: {error}") from error
    return messages


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give a row the names that a format knows; `columns` maps our name to the file's."""
    renamed = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken = set(columns.values())
    return {**{key: value for key, value in row.items() if key not in taken}, **renamed}


def _check_order(messages: Sequence[Message]) -> None:
    if not messages:
        raise _RowError("the conversation is empty")
    turns = list(messages[1:] if messages[0]["role"] == "system" else messages)
    for number, message in enumerate(messages[1:], 2):
        if message["role"] == "system":
            raise _RowError(f"message {number} is a system message; it may only come first")
    for position, message in enumerate(turns):
        expected = ("user", "assistant")[position % 2]
        if message["role"] != expected:
            number = position + 1 + len(messages) - len(turns)
            raise _RowError(
                f"message {number} is of the {message['role']}; turns must alternate, so it should be of the {expected}"
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise _RowError("the conversation ends with the user; it must end with the assistant's answer")


def _read_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{name} is {_describe(value)}; expected text")
    if not value.strip():
        raise _RowError(f"{name} is empty")
    return value


def _read_list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _RowError(f"{name} is {_describe(value)}; expected a list")
    return value


def _describe(value: object) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object")


_QUESTION_WORDS = ("question", "query", "instruction", "input", "prompt", "problem", "user", "text")
_ANSWER_WORDS = ("answer", "response", "output", "completion", "solution", "assistant", "target", "reply")


def _propose_columns(row: Mapping[str, Any]) -> str:
    keys = [str(key) for key in row]
    question = next((key for word in _QUESTION_WORDS for key in keys if word in key.lower()), "QUESTION_KEY")
    answer = next(
        (key for word in _ANSWER_WORDS for key in keys if word in key.lower() and key != question), "ANSWER_KEY"
    )
    return f"{{prompt: {question}, completion: {answer}}}"
