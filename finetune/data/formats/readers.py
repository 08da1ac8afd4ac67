"""Read a raw row: one function for each format.

Every function raises `RowError` for a value that it cannot use. The optional keys of a format are those read with `get`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.formats.messages import (
    Message,
    RowError,
    describe,
    read_list,
    read_message,
    read_messages,
    read_text,
    read_tools,
)
from finetune.data.formats.rows import Row


def read_openai_row(row: Mapping[str, Any]) -> Row:
    """Read `messages`, each with `role` and `content`."""
    return Row(read_messages(row["messages"]), tools=read_tools(row.get("tools")))


def read_sharegpt_row(row: Mapping[str, Any]) -> Row:
    """Read `conversations`, each turn with `from` and `value`."""
    return Row(_read_sharegpt_turns(row), tools=read_tools(row.get("tools")))


def _read_sharegpt_turns(row: Mapping[str, Any]) -> list[Message]:
    messages = read_messages(row["conversations"], "conversations")
    if row.get("system") and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": read_text(row["system"], "system")})
    return messages


def read_alpaca_row(row: Mapping[str, Any]) -> Row:
    """Read a question in `instruction` and `input`, its answer in `output`, and earlier turns in `history`."""
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


def read_prompt_completion_row(row: Mapping[str, Any]) -> Row:
    """Read a question and its answer: two texts, or two lists of messages."""
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


def read_plain_text_row(row: Mapping[str, Any]) -> Row:
    """Read a document."""
    return Row(text=read_text(row["text"], "text"))


def read_tokens_row(row: Mapping[str, Any]) -> Row:
    """Read token ids, which are trained as they are."""
    ids = read_list(row["input_ids"], "input_ids")
    wrong = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0), None)
    if wrong is not None or len(ids) < 2:
        raise RowError(
            f"input_ids must be two or more whole numbers from 0 on; found {describe(wrong if ids else ids)}"
        )
    return Row(token_ids=ids)


def read_prompt_row(row: Mapping[str, Any]) -> Row:
    """Read a prompt (a text or messages) and its reference answer, if it has one."""
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return Row(
        _read_turns(row["prompt"], "user", "prompt"), answer=None if answer is None else read_text(answer, "answer")
    )


def read_preference_row(row: Mapping[str, Any]) -> Row:
    """Read a pair. Its prompt has a key of its own, or is the beginning that both conversations share."""
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


def read_labelled_row(row: Mapping[str, Any]) -> Row:
    """Read a conversation, or a question and its answer, with a `label` that is true for a liked answer."""
    if not isinstance(row["label"], bool):
        raise RowError(f"label is {describe(row['label'])}; expected true or false")
    read = read_openai_row(row) if "messages" in row else read_prompt_completion_row(row)
    return Row(read.messages, label=row["label"], tools=read.tools)
