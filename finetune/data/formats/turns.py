"""The order of the turns of a conversation: what may follow what, turns that are joined, and what a person is told about it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from finetune.data.formats.messages import Message, RowError

# Which roles may follow a role; "start" is the beginning of the conversation. A tool's result may follow an answer that calls
# the tool in its text.
_FOLLOWERS = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_BETWEEN_JOINED_TURNS = "\n\n"


def add_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages with `system` as their system message, unless they have one."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def begins_with_greeting(messages: Sequence[Message]) -> bool:
    """Tell whether an answer stands before the first question. It answers nothing, so only `train_on: all` trains it."""
    roles = [message["role"] for message in messages[:3] if message["role"] != "system"]
    return roles[:2] == ["assistant", "user"]


def check_order(messages: Sequence[Message], *, ends_with: str = "assistant") -> None:
    """Check that the roles alternate, that only the first message is a system message, and which role comes last.

    Raises:
        RowError: the conversation is empty, or a message is out of order.
    """
    if not messages:
        raise RowError("the conversation is empty", "empty_text")
    before = "user" if begins_with_greeting(messages) else "start"
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
            raise RowError(_describe_wrong_turn(number, role, before, expected), "role_order")
        before = role
    if before != ends_with:
        last = "user" if before == "start" else before
        needed = "the assistant's answer" if ends_with == "assistant" else f"the {ends_with}"
        raise RowError(f"the conversation ends with the {last}; it must end with {needed}", "role_order")


def _describe_wrong_turn(number: int, role: str, before: str, expected: Sequence[str]) -> str:
    fault = f"message {number} is of the {role}; turns must alternate, so it should be of the {expected[0]}"
    if role == before:
        return f"{fault}, or set data.merge_turns: true, which joins turns of one speaker"
    return f"{fault}{' or '.join(['', *expected[1:]])}"


def merge_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with those of one speaker in a row joined, by a blank line; results of tools stay apart.

    Raises:
        RowError: messages cannot be joined, because one is trained and the other is not, or because of their thoughts.
    """
    joined: list[Message] = []
    for number, message in enumerate(messages, 1):
        if joined and joined[-1]["role"] == message["role"] != "tool":
            joined[-1] = _join(joined[-1], message, number)
        else:
            joined.append(message)
    return joined


def merge_pair(
    prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the prompt and the two answers of a pair, joined as `merge_turns` does; turns that an answer continues move to it."""
    prompt, chosen, rejected = merge_turns(prompt), list(chosen), list(rejected)
    if chosen and prompt and prompt[-1]["role"] == chosen[0]["role"] == rejected[0]["role"]:
        last = prompt.pop()
        chosen, rejected = [last, *chosen], [last, *rejected]
    return prompt, merge_turns(chosen), merge_turns(rejected)


def _join(first: Message, second: Message, number: int) -> Message:
    if first.get("train", True) != second.get("train", True):
        raise RowError(f"message {number} cannot be joined with the one before it: one is marked as not trained")
    others = {key for message in (first, second) for key in message} - {"role", "content", "tool_calls", "train"}
    if others:
        raise RowError(f"message {number} cannot be joined with the one before it: it holds {sorted(others)[0]}")
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    if first.get("tool_calls") and second["content"]:
        raise RowError(f"message {number} cannot be joined with the one before it, which calls a tool")
    texts = [message["content"] for message in (first, second) if message["content"]]
    joined = {**first, "content": _BETWEEN_JOINED_TURNS.join(texts)}
    return {**joined, "tool_calls": calls} if calls else joined


def check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that the results of several calls stand in the order of the calls: the chat template shows no ids.

    `messages` are those of the file, in OpenAI's keys.

    Raises:
        RowError: results stand in another order.
    """
    expected: list[Any] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            expected = [call.get("id") for call in calls if isinstance(call, Mapping)]
        found = message.get("tool_call_id")
        if len(expected) > 1 and found in expected:
            if found != expected[0]:
                raise RowError(
                    f"message {number} is the result of {found!r}, where that of {expected[0]!r} is expected; put the results in "
                    "the order of their calls",
                    "role_order",
                )
            expected = expected[1:]


def list_remarks(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what a person should know about how a conversation is read."""
    if begins_with_greeting(messages):
        yield "an answer stands before the first question; it answers nothing, so only data.train_on: all trains it"
    for before, message in pairwise(messages):
        if message["role"] == "tool" and before["role"] == "assistant" and not before.get("tool_calls"):
            yield "calls of tools are trained as the texts that they are: they stand in no tool_calls"
            return
