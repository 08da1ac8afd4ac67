"""The table of row formats: how a raw row becomes a conversation, a preference pair, a labelled answer, a prompt or a text.

It is pure Python, so that a recipe can be checked without importing anything heavy.
A format is one function and one row of the table; detection takes the first whose keys a row has, so the narrow ones come first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.data.formats.messages import (
    Message,
    RowError,
    check_order,
    describe,
    read_list,
    read_message,
    read_messages,
    read_text,
    read_tools,
)
from finetune.data.settings import RowShape
from finetune.errors import DataError

RowKind = Literal["conversation", "preference", "labelled", "text", "tokens", "prompt"]


@dataclass(frozen=True)
class Row:
    """A row as read. `messages` is the whole conversation, or the prompt of `chosen` and `rejected` or of a reference `answer`."""

    messages: list[Message] = field(default_factory=list)
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    label: bool | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    answer: str | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Format:
    """One format: its row kind, the keys it needs and may have, and the function that reads a row."""

    name: str
    row_kind: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]


def _read_openai(row: Mapping[str, Any]) -> Row:
    return Row(read_messages(row["messages"]), tools=read_tools(row.get("tools")))


def _read_sharegpt(row: Mapping[str, Any]) -> Row:
    return Row(_read_sharegpt_turns(row), tools=read_tools(row.get("tools")))


def _read_sharegpt_turns(row: Mapping[str, Any]) -> list[Message]:
    messages = read_messages(row["conversations"], "conversations")
    if row.get("system") and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": read_text(row["system"], "system")})
    return messages


def _read_alpaca(row: Mapping[str, Any]) -> Row:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": read_text(row["system"], "system")})
    for number, turn in enumerate(read_list(row.get("history") or [], "history"), 1):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise RowError(f"turn {number} of history is {describe(turn)}; expected a question and an answer")
        messages += _pair(turn[0], turn[1], f"turn {number} of history")
    question = read_text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n" + read_text(row["input"], "input")
    return Row(messages + _pair(question, row["output"], "output"))


def _read_prompt_completion(row: Mapping[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    tools = read_tools(row.get("tools"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return Row(read_messages([*prompt, *completion]), tools=tools)
    return Row(_pair(prompt, completion, "completion"), tools=tools)


def _pair(question: object, answer: object, name: str) -> list[Message]:
    return [
        {"role": "user", "content": read_text(question, "the question")},
        {"role": "assistant", "content": read_text(answer, name)},
    ]


def _read_plain_text(row: Mapping[str, Any]) -> Row:
    return Row(text=read_text(row["text"], "text"))


def _read_tokens(row: Mapping[str, Any]) -> Row:
    ids = read_list(row["input_ids"], "input_ids")
    wrong = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0), None)
    if wrong is not None or len(ids) < 2:
        raise RowError(
            f"input_ids must be two or more whole numbers from 0 on; found {describe(wrong if ids else ids)}"
        )
    return Row(token_ids=ids)


def _read_prompt(row: Mapping[str, Any]) -> Row:
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return Row(
        _read_turns(row["prompt"], "user", "prompt"), answer=None if answer is None else read_text(answer, "answer")
    )


def _read_preference(row: Mapping[str, Any]) -> Row:
    """Read a pair whose prompt is given apart, as ShareGPT turns, or as the beginning that both conversations share."""
    chosen = _read_turns(row["chosen"], "assistant", "chosen")
    rejected = _read_turns(row["rejected"], "assistant", "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if "conversations" in row:
        prompt = _read_sharegpt_turns(row) + prompt
    elif "prompt" in row and not shared:
        prompt = _read_turns(row["prompt"], "user", "prompt")
    return Row(prompt, chosen[shared:], rejected[shared:], tools=read_tools(row.get("tools")))


def _read_turns(value: object, role: str, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": read_text(value, name)}]
    return [read_message(value, name)] if isinstance(value, Mapping) else read_messages(value, name)


def _read_labelled(row: Mapping[str, Any]) -> Row:
    if not isinstance(row["label"], bool):
        raise RowError(f"label is {describe(row['label'])}; expected true or false")
    read = _read_openai(row) if "messages" in row else _read_prompt_completion(row)
    return Row(read.messages, label=row["label"], tools=read.tools)


FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "sharegpt_preference",
            "preference",
            ("conversations", "chosen", "rejected"),
            ("system", "tools"),
            _read_preference,
        ),
        Format("preference", "preference", ("chosen", "rejected"), ("prompt", "tools"), _read_preference),
        Format("labelled_messages", "labelled", ("messages", "label"), ("tools",), _read_labelled),
        Format("labelled", "labelled", ("prompt", "completion", "label"), (), _read_labelled),
        Format("messages", "conversation", ("messages",), ("tools",), _read_openai),
        Format("sharegpt", "conversation", ("conversations",), ("system", "tools"), _read_sharegpt),
        Format("alpaca", "conversation", ("instruction", "output"), ("input", "system", "history"), _read_alpaca),
        Format("prompt_completion", "conversation", ("prompt", "completion"), ("tools",), _read_prompt_completion),
        Format("text", "text", ("text",), (), _read_plain_text),
        Format("tokens", "tokens", ("input_ids",), (), _read_tokens),
        Format("prompt", "prompt", ("prompt",), ("answer",), _read_prompt),
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
        _check_row(entry.row_kind, read)
    except RowError as error:
        raise DataError(f"{where}: {error}") from error
    return read


def as_prompt(row: Row, where: str) -> Row:
    """Return a row as a prompt: of a conversation its last answer becomes the reference, of a pair the chosen one.

    Raises:
        DataError: the row holds no question, or tool calls, which a prompt cannot carry.
    """
    messages, answers = row.messages, row.chosen
    if not answers and messages and messages[-1]["role"] == "assistant":
        messages, answers = messages[:-1], messages[-1:]
    try:
        check_order(messages, ends_with="user")
        if row.tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
            raise RowError("holds tools; a prompt is plain turns")
    except RowError as error:
        raise DataError(f"{where}: cannot be asked: {error}") from error
    answer = str(answers[-1]["content"]) if answers else row.answer
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Row(turns, answer=answer or None)


def check_pair(row: Row) -> None:
    """Refuse a pair whose sides are not two answers to one prompt.

    Raises:
        RowError: the sides differ before their last answer, so there is no shared prompt.
    """
    if row.chosen[0]["role"] != "assistant":
        raise RowError(
            f"chosen and rejected answer different prompts (they differ from a {row.chosen[0]['role']} message on); "
            "a pair must share everything before its last answer"
        )
    if len(row.chosen) != 1 or len(row.rejected) != 1:
        raise RowError(
            "chosen and rejected differ before their last answer; a pair must share everything before it, so cut both "
            "after the first answer that differs"
        )


def _check_row(kind: RowKind, row: Row) -> None:
    if kind == "preference":
        for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
            try:
                check_order([*row.messages, *answer])
            except RowError as error:
                raise RowError(f"{name}: {error}") from error
    elif kind == "prompt":
        check_order(row.messages, ends_with="user")
    elif kind not in ("text", "tokens"):
        check_order(row.messages)


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
