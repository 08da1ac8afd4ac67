"""Find the keys of a row that nothing reads: each is counted by its name, and refused where the row means something else without it."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data.formats.messages import COUNTER_MARK, MARKS, ROLE_NAMES, THOUGHTS, RowError, is_empty
from finetune.errors import describe_count

# The key under which `finetune clean` and `finetune synthesize` say what a row has passed.
PROVENANCE = "provenance"
# The keys under which a row holds messages.
_LISTS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_SHARED_KEYS = frozenset({"tool_calls", "function_call", "tool_call_id", COUNTER_MARK, *MARKS, *THOUGHTS})
_MESSAGE_KEYS = {"role": _SHARED_KEYS | {"role", "content"}, "from": _SHARED_KEYS | {"from", "value"}}
_TOOL_ROLES = tuple(name for name, role in ROLE_NAMES.items() if role == "tool")
# Marks of messages of these roles train nothing.
_READ_ROLES = tuple(name for name, role in ROLE_NAMES.items() if role != "assistant")
_CALL_KEYS = frozenset({"id", "index", "type", "name", "arguments", "function"})
_PART_KEYS = frozenset({"type", "text", "value"})
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TEXT_ONLY = (
    "which cannot be trained: the model reads text only; leave the row out, or the key if the text stands without it"
)
_MESSAGE_REFUSALS = {
    **dict.fromkeys(_MEDIA, _TEXT_ONLY),
    "loss_scale": "a weight that cannot be trained; mark the message with train: true or false instead",
    "train_detail": "marks of parts of a message, which cannot be trained; mark the whole message with train: true or false",
}
_ROW_REFUSALS = {
    **dict.fromkeys(_MEDIA, _TEXT_ONLY),
    **dict.fromkeys(
        ("system_prompt", "system_message"),
        "a system message under another name; map it with data.columns: {system: KEY}, or remove the key",
    ),
}

# Where the kit's own rows come from; it is written for people.
_SILENT = frozenset({PROVENANCE})

Rendered = Mapping[str, bool]


def list_unused_keys(row: Mapping[str, Any], known: frozenset[str], rendered: Rendered) -> tuple[str, ...]:
    """Return the keys of a row and of its messages that are not used, sorted, such as `images` and `messages.name`.

    `known` holds the keys that the row's format reads. `rendered` maps the keys of thoughts that the chat template renders to
    whether it renders them in every answer or, where false, only in the last.

    Raises:
        RowError: without one of these keys, the row would mean something else.
    """
    unused = {key for key in row.keys() - known - _SILENT if not is_empty(row[key])}
    if isinstance(row.get("loss"), bool):
        unused.discard("loss")
    for key in sorted(unused & _ROW_REFUSALS.keys()):
        raise RowError(f"has {key!r}, {_ROW_REFUSALS[key].replace('KEY', key)}")
    for name in _LISTS:
        value = row.get(name)
        if value is None or isinstance(value, str) or name not in known:
            continue
        messages = value if isinstance(value, list) else [value]
        for number, message in enumerate(messages, 1):
            if isinstance(message, Mapping):
                is_last = number == len(messages) and name != "prompt"
                unused.update(_list_message_keys(message, name, number, _choose_rendered(rendered, is_last)))
    return tuple(sorted(unused)) if unused else ()


def _choose_rendered(rendered: Rendered, is_last: bool) -> Rendered:
    return rendered if is_last or not rendered else {key: True for key, in_all in rendered.items() if in_all}


def _list_message_keys(message: Mapping[str, Any], name: str, number: int, rendered: Rendered) -> Iterator[str]:
    role = "from" if "from" in message and "role" not in message else "role"
    others = message.keys() - _MESSAGE_KEYS[role]
    if others and message.get(role) in _TOOL_ROLES:
        others -= {"name"}
    yield from (f"{name}.{key}" for key in others if not is_empty(message[key]))
    if len(message) > 2:
        _refuse_keys(message, f"message {number}" if name == "messages" else f"message {number} of {name}", rendered)
        yield from _list_vain_marks(message, name, str(message.get(role)).lower())
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            yield from _list_call_keys(message[key], f"{name}.{key}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, Mapping)]
        yield from (f"{name}.content.{key}" for part in parts for key in part.keys() - _PART_KEYS)


def _refuse_keys(message: Mapping[str, Any], where: str, rendered: Rendered) -> None:
    for key, reason in _MESSAGE_REFUSALS.items():
        if key in message and not is_empty(message[key]):
            raise RowError(f"{where} has {key!r}, {reason}")
    for key in THOUGHTS:
        if key in message and key not in rendered and not is_empty(message[key]):
            raise RowError(
                f"{where} has {key!r}, which the chat template does not render there, so it would not be trained; write it "
                "into the text, remove the key, or set data.template to one that renders it"
            )


def _list_vain_marks(message: Mapping[str, Any], name: str, role: str) -> Iterator[str]:
    """Yield the marks that ask to train what only the assistant's messages can have."""
    if role in _READ_ROLES:
        yield from (f"{name}.{key} of the {role}" for key in MARKS if message.get(key) in (1, "1", "true"))
        if COUNTER_MARK in message and message[COUNTER_MARK] in (0, "0", "false"):
            yield f"{name}.{COUNTER_MARK} of the {role}"


def _list_call_keys(calls: object, name: str) -> Iterator[str]:
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, Mapping):
            yield from (f"{name}.{key}" for key in call.keys() - _CALL_KEYS)
            if isinstance(call.get("function"), Mapping):
                yield from (f"{name}.function.{key}" for key in call["function"].keys() - _CALL_KEYS)


def describe_remarks(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return one sentence for each remark about how rows are read, with the number of rows."""
    return tuple(f"{remark} ({describe_count(count, 'row')})" for remark, count in sorted(counts.items()))


def describe_unused(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return one sentence that names the keys that were not used, with the rows that hold each, or nothing."""
    if not counts:
        return ()
    shown = (f"{key} ({describe_count(count, 'row')})" for key, count in sorted(counts.items()))
    return (f"keys not used: {', '.join(shown)}",)
