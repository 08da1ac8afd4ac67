"""Read messages in OpenAI's and ShareGPT's keys, with tool calls, tool results and thoughts, and check their order."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.errors import FaultKind, find_close_match

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# Under these keys other tools say whether a message or a row is trained.
MARKS = ("train", "training", "weight", "loss_weight", "loss", "loss_mask")
# Under these keys a message holds what the assistant thought before its answer. Few chat templates render it.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_details")
# CSV files hold every value as text.
_MARK_TEXTS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
# Which roles may follow a role; "start" is the beginning of the conversation.
_FOLLOWERS = {"start": ("user",), "user": ("assistant",), "assistant": ("user",), "tool": ("assistant", "tool")}


class RowError(Exception):
    """A row that cannot be used. The text names the fault without the place, which the caller adds.

    `kind` is the kind of finding that `finetune lint` makes of it.
    """

    def __init__(self, fault: str, kind: FaultKind = "unreadable") -> None:
        self.kind = kind
        super().__init__(fault)


def read_messages(value: object, name: str = "messages") -> list[Message]:
    """Read a list of messages in OpenAI's or ShareGPT's keys."""
    return [read_message(message, f"message {number}") for number, message in enumerate(read_list(value, name), 1)]


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
    # OpenAI's older name of what a tool returns.
    role = "tool" if message["role"] == "function" else message["role"]
    if role not in ROLES:
        raise _unknown_role(role, where)
    read: Message = {"role": role}
    content = message.get("content")
    read["content"] = "" if has_calls and content in (None, "") else _read_content(content, f"the content of {where}")
    if has_calls:
        read["tool_calls"] = _read_calls(message, role, where)
    if len(message) > len(read):
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


def _unknown_role(role: object, where: str) -> RowError:
    known = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    hint = find_close_match(str(role), ROLES) or known.get(str(role))
    expected = f"{where} has the role {role!r}; expected {', '.join(ROLES)}"
    return RowError(expected + (f" (did you mean {hint!r}?)" if hint else ""))


def _read_sharegpt_message(message: Mapping[str, Any], where: str) -> Message:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise RowError(f"{where} is from {speaker!r}; expected {', '.join(_SHAREGPT_ROLES)}")
    if beside := [key for key in ("tool_calls", "function_call") if message.get(key)]:
        raise RowError(f"{where} has {beside[0]} beside from and value; give it role and content instead")
    text = read_text(message["value"], f"the value of {where}")
    read: Message = {"role": _SHAREGPT_ROLES[speaker], "content": text}
    if speaker == "function_call":
        calls = parse_json(text, f"the function_call of {where}")
        calls = calls if isinstance(calls, list) else [calls]
        read = {"role": "assistant", "content": "", "tool_calls": [_read_call(call, where) for call in calls]}
    return {**read, **_read_thoughts(message, where), **_read_train(message, where)}


def _read_content(value: object, name: str) -> str:
    if not isinstance(value, list):
        return read_text(value, name)
    texts: list[str] = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else describe(part)
            raise RowError(f"{name} holds a part that is {kind!r}; only text parts can be trained")
        if not isinstance(part.get("text"), str):
            raise RowError(f"{name} holds a text part without text")
        texts.append(part["text"])
    return read_text("".join(texts), name)


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
    if len(set(found.values())) > 1:
        shown = " and ".join(f"{key}: {marked[key]!r}" for key in found)
        raise RowError(f"{where} is marked as trained and as not trained ({shown}); keep one of the marks")
    return next(iter(found.values()), None)


def _read_mark_value(key: str, value: object, where: str) -> bool:
    if isinstance(value, str) and value.lower() in _MARK_TEXTS:
        return _MARK_TEXTS[value.lower()]
    if value not in (0, 1):
        shown = describe(value) if isinstance(value, list | dict) else repr(value)
        raise RowError(
            f"{key} of {where} is {shown}; expected true or false, or 1 or 0; other weights cannot be trained"
        )
    return bool(value)


def add_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages with `system` as their system message, unless they have one."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_order(messages: Sequence[Message], *, ends_with: str = "assistant") -> None:
    """Check that the roles alternate, that only the first message is a system message, and which role comes last.

    Raises:
        RowError: the conversation is empty, or a message is out of order.
    """
    if not messages:
        raise RowError("the conversation is empty", "empty_text")
    before = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system":
            if number > 1:
                raise RowError(f"message {number} is a system message; it may only come first", "role_order")
            continue
        expected = _FOLLOWERS[before]
        if before == "assistant" and messages[number - 2].get("tool_calls"):
            expected = ("tool",)
        if role not in expected:
            raise RowError(
                f"message {number} is of the {role}; turns must alternate, so it should be of the {' or '.join(expected)}",
                "role_order",
            )
        before = role
    if before != ends_with:
        last = "user" if before == "start" else before
        needed = "the assistant's answer" if ends_with == "assistant" else f"the {ends_with}"
        raise RowError(f"the conversation ends with the {last}; it must end with {needed}", "role_order")


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
        fault = "a number that is no JSON, such as NaN or Infinity; write null, another number or a text"
        raise RowError(f"{name} holds {fault}") from error
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"{name} is no JSON ({error})") from error


def describe(value: object) -> str:
    """Name the type of a JSON value for a person."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object")


def is_empty(value: object) -> bool:
    """Tell whether a value holds nothing that could be trained: null, blank text, an empty list or object."""
    return value is None or (
        isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)
    )
