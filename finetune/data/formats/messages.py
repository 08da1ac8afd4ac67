"""Read messages in OpenAI's and ShareGPT's keys, with tool calls, tool results and thoughts, and check their order."""

import json
from collections.abc import Mapping
from typing import Any

from finetune.errors import FaultKind, find_close_match

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
# The names of the roles in files of many tools: OpenAI, ShareGPT, Gemini, ms-swift, Llama 3 and others.
ROLE_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
# Under these names a message is a call of a tool, as JSON in its text.
_CALLS = ("function_call", "tool_call")
# Parts of a message that are text.
TEXT_PARTS = ("text", "input_text", "output_text")
# Under these keys other tools say whether a message or a row is trained.
MARKS = ("train", "training", "trainable", "weight", "loss_weight", "loss", "loss_mask")
# Under this key a message says that it is not trained (torchtune's rows).
COUNTER_MARK = "masked"
# Under these keys a message holds what the assistant thought before its answer. Few chat templates render it.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_details")
NO_FINITE_NUMBER = "holds a number that is no JSON, such as NaN or Infinity; write null, another number or a text"
# CSV files hold every value as text.
_MARK_TEXTS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


class RowError(Exception):
    """A row that cannot be used. The text names the fault without the place, which the caller adds.

    `kind` is the kind of finding that `finetune lint` makes of it.
    """

    def __init__(self, fault: str, kind: FaultKind = "unreadable") -> None:
        self.kind = kind
        super().__init__(fault)


def read_messages(value: object, name: str = "messages") -> list[Message]:
    """Read a list of messages in OpenAI's or ShareGPT's keys. Empty system messages are left out; calls of tools are joined."""
    messages: list[Message] = []
    raw_messages = read_list(value, name)
    for number, raw in enumerate(raw_messages, 1):
        if isinstance(raw, Mapping) and _is_empty_system(raw):
            continue
        message = read_message(raw, f"message {number}")
        if _name_role(raw) in _CALLS and messages and _continues(messages[-1], message):
            messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]}
        else:
            messages.append(message)
    return messages


def _is_empty_system(message: Mapping[str, Any]) -> bool:
    text = message.get("content") if "role" in message else message.get("value")
    return ROLE_NAMES.get(_name_role(message)) == "system" and is_empty(text)


def _continues(before: Message, message: Message) -> bool:
    """Tell whether a call of a tool belongs to the message before it: tools are called after a text, or several at once."""
    return bool(before["role"] == "assistant" and before.get("train", True) == message.get("train", True))


def _name_role(message: Mapping[str, Any]) -> str:
    """Return the role of a message as its file names it, in lower case, or "" where it is no text."""
    role = message.get("role", message.get("from"))
    return role.lower() if isinstance(role, str) else ""


def read_message(message: object, where: str) -> Message:
    """Read one message: its role, its text, tool calls and thoughts, and `train: False` where it is not to be trained."""
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {describe(message)}; expected an object with role and content")
    if "from" in message and "value" in message and "role" not in message:
        return _read_sharegpt_message(message, where)
    has_calls = bool(message.get("tool_calls") or message.get("function_call"))
    missing = [key for key in ("role", "content") if key not in message and not (key == "content" and has_calls)]
    if missing:
        raise RowError(f"{where} has no {missing[0]!r}; found {', '.join(map(str, message)) or 'nothing'}")
    role = ROLE_NAMES.get(_name_role(message))
    if role is None:
        raise _unknown_role(message["role"], f"{where} has the role")
    read: Message = {"role": role}
    content, calls = _read_content(message.get("content"), f"the content of {where}", role, has_calls=has_calls)
    read["content"] = content
    if has_calls:
        calls = [*calls, *_read_calls(message, role, where)]
    elif _name_role(message) in _CALLS:
        read["content"], calls = "", _read_call_text(content, where)
    if calls:
        read["tool_calls"] = calls
    if len(message) > len(read) or calls:
        read |= _read_thoughts(message, where) | _read_train(message, where)
    return read


def _read_calls(message: Mapping[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """Read `tool_calls` or its older form, a single `function_call`."""
    key = "tool_calls" if message.get("tool_calls") else "function_call"
    if role != "assistant":
        raise RowError(f"{where} of the {role} has {key}; only the assistant calls tools")
    if key == "function_call":
        return [_read_call(message[key], where)]
    if message.get("function_call"):
        raise RowError(f"{where} has tool_calls and function_call, its older form; keep one of them")
    value = message[key]
    calls = parse_json(value, f"tool_calls of {where}") if isinstance(value, str) else value
    return [_read_call(call, where) for call in read_list(calls, f"tool_calls of {where}")]


def _read_thoughts(message: Mapping[str, Any], where: str) -> Message:
    thoughts = {key: read_text(message[key], f"{key} of {where}") for key in THOUGHTS if message.get(key)}
    if len(set(thoughts.values())) > 1:
        raise RowError(f"{where} has {' and '.join(thoughts)} with different texts; keep one of them")
    return thoughts


def _unknown_role(role: object, which: str) -> RowError:
    hint = find_close_match(str(role).lower(), ROLE_NAMES)
    expected = f"{which} {role!r}; expected {', '.join(ROLES)}"
    return RowError(expected + (f" (did you mean {hint!r}?)" if hint else ""))


def _read_sharegpt_message(message: Mapping[str, Any], where: str) -> Message:
    role = ROLE_NAMES.get(_name_role(message))
    if role is None:
        raise _unknown_role(message["from"], f"{where} is from")
    if beside := [key for key in ("tool_calls", "function_call") if message.get(key)]:
        raise RowError(f"{where} has {beside[0]} beside from and value; give it role and content instead")
    text, calls = _read_content(message["value"], f"the value of {where}", role)
    if _name_role(message) in _CALLS:
        text, calls = "", _read_call_text(text, where)
    read: Message = {"role": role, "content": text} | ({"tool_calls": calls} if calls else {})
    return {**read, **_read_thoughts(message, where), **_read_train(message, where)}


def _read_call_text(text: str, where: str) -> list[dict[str, Any]]:
    """Read the text of a message that is a call of a tool: one call, or a list of calls, as JSON."""
    calls = parse_json(text, f"the call of a tool in {where}")
    return [_read_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _read_content(value: object, name: str, role: str, *, has_calls: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """Read the text of a message, or its parts: texts, and calls of tools (as LLaMA-Factory's version 1 writes them).

    The text may be empty beside calls, and where it is the result of a tool.
    """
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, Mapping) else describe(part)
            text = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
            if kind not in (*TEXT_PARTS, "tool_call"):
                raise RowError(f"{name} holds a part that is {kind!r}; only text parts can be trained")
            if not isinstance(text, str):
                raise RowError(f"{name} holds a text part without text")
            if kind == "tool_call" and role != "assistant":
                raise RowError(f"{name} of the {role} holds a tool_call; only the assistant calls tools")
            if kind == "tool_call":
                calls += _read_call_text(text, name)
            else:
                texts.append(text)
    may_be_empty = has_calls or bool(calls) or role == "tool"
    joined = "".join(texts) if isinstance(value, list) else value
    return "" if may_be_empty and is_empty(joined) else read_text(joined, name), calls


def _read_call(call: object, where: str) -> dict[str, Any]:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        raise RowError(f"{where} has a tool call that is {describe(call)}; expected an object with name and arguments")
    if "arguments" not in call and (others := [key for key in call if key not in ("name", "id", "type", "index")]):
        raise RowError(f"{where} has a tool call without arguments; found {', '.join(others)}; name them arguments")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"the arguments of a tool call of {where}")
    check_json([call["name"], arguments], f"a tool call of {where}")
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _read_train(message: Mapping[str, Any], where: str) -> dict[str, bool]:
    return {"train": False} if read_mark(message, where) is False else {}


def read_mark(marked: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a message or a row is marked as trained or not, or None where it has no mark.

    Raises:
        RowError: a mark is neither true nor false, such as a weight of 0.5, or two marks contradict each other.
    """
    found = {key: _read_mark_value(key, marked[key], where) for key in MARKS if marked.get(key) is not None}
    if marked.get(COUNTER_MARK) is not None:
        found[COUNTER_MARK] = not _read_mark_value(COUNTER_MARK, marked[COUNTER_MARK], where)
    if len(set(found.values())) > 1:
        shown = " and ".join(f"{key}: {marked[key]!r}" for key in found)
        raise RowError(f"{where} is marked as trained and as not trained ({shown}); keep one of the marks")
    return next(iter(found.values()), None)


def _read_mark_value(key: str, value: object, where: str) -> bool:
    if (known := read_switch(value)) is not None:
        return known
    shown = describe(value) if isinstance(value, list | dict) else repr(value)
    raise RowError(f"{key} of {where} is {shown}; expected true or false, or 1 or 0; other weights cannot be trained")


def read_switch(value: object) -> bool | None:
    """Return a value that says yes or no, also as 1 and 0 or as a text, as CSV files hold it; None for any other value."""
    if isinstance(value, str):
        return _MARK_TEXTS.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def read_text(value: object, name: str) -> str:
    """Return `value` where it is a text that is not empty and can be written as UTF-8.

    Raises:
        RowError: it is anything else.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {describe(value)}; expected text")
    if not value.strip():
        raise RowError(f"{name} is empty", "empty_text")
    if not value.isascii():
        check_characters(value, name)
    return value


def check_characters(text: str, name: str) -> None:
    """Refuse lone surrogates (half characters): no tokenizer takes them, and `spellings.py` uses them as marks."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise RowError(f"{name} holds half a character ({half}); repair the file's encoding") from error


def check_json(value: object, name: str) -> None:
    """Refuse what the text of a tool call cannot hold: NaN, Infinity, half characters, and values of other types.

    Raises:
        RowError: the value holds one of them.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RowError(f"{name} {NO_FINITE_NUMBER}") from error
    except TypeError as error:
        raise RowError(f"{name} holds a value that is no JSON ({error}); write it as a text") from error
    check_characters(text, name)


def read_list(value: object, name: str) -> list[Any]:
    """Return `value` where it is a list.

    Raises:
        RowError: it is anything else.
    """
    if not isinstance(value, list):
        raise RowError(f"{name} is {describe(value)}; expected a list")
    return value


def parse_json(text: str, name: str) -> Any:
    """Parse JSON that is stored in a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also for a number of thousands of digits
        raise RowError(f"{name} is no JSON ({error})") from error


def describe(value: object) -> str:
    """Name the type of a JSON value for a person."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    kinds[bytes] = "binary data"
    return kinds.get(type(value), "an object")


def is_empty(value: object) -> bool:
    """Tell whether a value holds nothing that could be trained: null, blank text, an empty list or object."""
    return value is None or (
        isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)
    )
