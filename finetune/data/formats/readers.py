"""Read a raw row: one function for each format.

Every function raises `RowError` for a value that it cannot use. What it reads with `get` is optional in `row_formats.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.formats.messages import (
    Message,
    RowError,
    describe,
    is_empty,
    read_list,
    read_message,
    read_messages,
    read_switch,
    read_text,
)
from finetune.data.formats.rows import Row
from finetune.data.formats.tools import read_tools
from finetune.data.formats.turns import add_system, check_results

# fmt: off
_QUESTION_WORDS = (
    "question", "query", "instruction", "prompt", "problem", "input", "user", "text", "messages", "问题", "提问", "指令", "输入",
)
_ANSWER_WORDS = (
    "answer", "response", "output", "completion", "solution", "assistant", "target", "reply", "答案", "回答", "回复", "输出",
)
# fmt: on


def read_openai_row(row: Mapping[str, Any]) -> Row:
    """Read `messages`, each with `role` and `content`."""
    messages = read_messages(row["messages"])
    check_results(row["messages"])
    return Row(_put_system(row, messages), tools=read_tools(row))


def read_sharegpt_row(row: Mapping[str, Any]) -> Row:
    """Read `conversations`, each turn with `from` and `value`."""
    return Row(_put_system(row, read_messages(row["conversations"], "conversations")), tools=read_tools(row))


def _put_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages of a row with its `system` before them."""
    if is_empty(row.get("system")):
        return messages
    text = read_text(row["system"], "system")
    if messages and messages[0]["role"] == "system" and messages[0]["content"].strip() != text.strip():
        raise RowError("has a system message and another text in the key system; keep one of them")
    return add_system(messages, text)


def read_alpaca_row(row: Mapping[str, Any]) -> Row:
    """Read a question in `instruction` and `input`, its answer in `output`, and earlier turns in `history`."""
    answer = {"role": "assistant", "content": read_text(row["output"], "output")}
    return Row([*_read_prompt(row, "instruction"), answer], tools=read_tools(row))


def read_prompt_completion_row(row: Mapping[str, Any]) -> Row:
    """Read a question and its answer, each a text or a list of messages."""
    answer = _read_turns(row["completion"], "assistant", "completion")
    return Row([*_read_prompt(row, "prompt"), *answer], tools=read_tools(row))


def _read_prompt(row: Mapping[str, Any], key: str) -> list[Message]:
    """Read a question: its system message, earlier turns in `history`, and its text with `input` after it."""
    if is_empty(row.get("input")):
        messages = _read_turns(row[key], "user", key)
    elif not is_empty(row[key]) and not isinstance(row[key], str):
        raise RowError(f"has input beside {key}, which is no text; write it into the messages")
    else:
        texts = [read_text(row[name], name) for name in (key, "input") if not is_empty(row[name])]
        messages = [{"role": "user", "content": "\n".join(texts)}]
    return _put_system(row, [*_read_history(row), *messages])


def _read_history(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(read_list(row.get("history") or [], "history"), 1):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise RowError(f"turn {number} of history is {describe(turn)}; expected a question and an answer")
        messages.append({"role": "user", "content": read_text(turn[0], "the question")})
        messages.append({"role": "assistant", "content": read_text(turn[1], f"turn {number} of history")})
    return messages


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
    if row.get("labels") not in (None, ids):
        raise RowError(
            "has labels that differ from input_ids, but all tokens are trained; leave labels out, or give texts or messages"
        )
    for key in ("attention_mask", "assistant_masks", "completion_mask"):
        if not all(row.get(key) or [True]):
            raise RowError(f"has {key} with zeros, but all tokens are trained; leave those tokens out, and the key")
    return Row(token_ids=ids)


def read_prompt_row(row: Mapping[str, Any]) -> Row:
    """Read a prompt (a text or messages) and its reference answer, if it has one."""
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return Row(
        _read_prompt(row, "prompt"),
        answer=None if answer is None else read_text(answer, "answer"),
        tools=read_tools(row),
    )


def read_preference_row(row: Mapping[str, Any]) -> Row:
    """Read a pair. Its prompt has a key of its own, or is the beginning that both conversations share, or is both together."""
    chosen = _read_turns(row["chosen"], "assistant", "chosen")
    rejected = _read_turns(row["rejected"], "assistant", "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = _put_system(row, _join_prompt(_read_pair_prompt(row), chosen[:shared]))
    if all(message["role"] in ("system", "assistant") for message in [*prompt, *chosen[shared:-1]]):
        key = find_question_key(row, "KEY")
        raise RowError(f"has no question before its answers; name its key, such as data.columns: {{prompt: {key}}}")
    return Row(prompt, chosen[shared:], rejected[shared:], tools=read_tools(row))


def _read_pair_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Return the prompt of a pair that has a key of its own, without the key `system`."""
    keys = [key for key in ("conversations", "prompt", "instruction") if not is_empty(row.get(key))]
    if len(keys) > 1:
        raise RowError(f"has {' and '.join(keys)}; a pair has one prompt, so keep one of them")
    named = [key for key in ("prompt", "instruction") if key in row]
    if not keys and named and not is_empty(row.get("input")):
        keys = named[:1]
    if not keys:
        for key in ("input", "history"):
            if not is_empty(row.get(key)):
                found = find_question_key(row, "KEY")
                raise RowError(
                    f"has {key} without a prompt; name its question, such as data.columns: {{prompt: {found}}}"
                )
        return []
    return _read_prompt({**row, "system": None}, keys[0])


def _join_prompt(prompt: list[Message], shared: list[Message]) -> list[Message]:
    """Return the prompt of a pair from its own key and from the turns that both answers begin with.

    The turns may repeat the prompt or its end, or continue it.
    """
    if not prompt or not shared:
        return prompt or shared
    own, common = ([(turn["role"], turn["content"].strip()) for turn in turns] for turns in (prompt, shared))
    if any(common[start : start + len(own)] == own for start in range(len(common))):
        return shared
    if own[-len(common) :] == common:
        return prompt
    if own[-1][0] != "user" and common[0][0] == "user":
        return [*prompt, *shared]
    raise RowError("has a prompt that is not how chosen and rejected begin; leave it out, or make them agree")


def _read_turns(value: object, role: str, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": read_text(value, name)}]
    if not isinstance(value, Mapping | list):
        raise RowError(f"{name} is {describe(value)}; expected text, or a list of messages")
    return [read_message(value, name)] if isinstance(value, Mapping) else read_messages(value, name)


def read_labelled_row(row: Mapping[str, Any]) -> Row:
    """Read a conversation, or a question and its answer, with a `label` that is true for a liked answer."""
    label = read_switch(row["label"])
    if label is None:
        shown = repr(row["label"]) if isinstance(row["label"], str) else describe(row["label"])
        raise RowError(f"label is {shown}; expected true or false, or 1 or 0")
    read = read_openai_row(row) if "messages" in row else read_prompt_completion_row(row)
    return Row(read.messages, label=label, tools=read.tools)


def find_question_key(row: Mapping[str, Any], default: str) -> str:
    """Return the key of a row that most likely holds its question, by its name."""
    keys = [str(key) for key in row if not is_empty(row[key])]
    return next((key for word in _QUESTION_WORDS for key in keys if word in key.lower()), default)


def find_answer_key(row: Mapping[str, Any], question: str, default: str) -> str:
    """Return the key of a row that most likely holds the answer to the key `question`, by its name."""
    keys = [str(key) for key in row if key != question]
    return next((key for word in _ANSWER_WORDS for key in keys if word in key.lower()), default)
