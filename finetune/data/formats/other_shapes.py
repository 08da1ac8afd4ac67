"""Bring rows that other tools write into the keys and values that the formats read, and say what was read in another way.

Sources of the shapes: OpenAI's guide to fine-tuning (`preferred_output`), ms-swift 3 (`rejected_response`, `rejected_messages`),
LLaMA-Factory (`output` with two answers; `chosen_messages` of its version 1), Firefly (`human` and `assistant` in one turn), and
Anthropic's HH-RLHF (texts with `Human:` and `Assistant:`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from finetune.data.formats.messages import RowError, describe, is_empty

Raw = Mapping[str, Any]
_LISTS = ("messages", "conversations")
_TEXTS_OR_LISTS = ("prompt", "completion", "chosen", "rejected")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def adapt_row(row: Raw) -> tuple[Raw, tuple[str, ...]]:
    """Return a row in the keys and values of the formats, and remarks about what was read in another way.

    Raises:
        RowError: a shape is recognised, and its values cannot be used.
    """
    adapted = _adapt_keys(row)
    remarks = []
    for key in (*_LISTS, *_TEXTS_OR_LISTS):
        value = adapted.get(key)
        if isinstance(value, str) and (messages := _parse_messages(value, key)) is not None:
            adapted = {**adapted, key: messages}
            remarks.append(f"{key} holds messages as JSON text, and is read as messages")
        elif isinstance(value, list) and any(isinstance(turn, Mapping) and _is_firefly(turn) for turn in value):
            adapted = {**adapted, key: _split_turns(value)}
    transcripts = _read_transcripts(adapted)
    if transcripts:
        adapted = {**adapted, **transcripts}
        remarks.append(f"{', '.join(transcripts)}: texts with Human: and Assistant: are read as turns")
    return adapted, tuple(remarks)


def _adapt_keys(row: Raw) -> Raw:
    if "preferred_output" in row and isinstance(row.get("input"), Mapping):
        return _adapt_openai(row)
    if isinstance(row.get("output"), list):
        return _adapt_answers(row)
    for name in ("chosen", "rejected"):
        if f"{name}_messages" in row and name not in row:
            row = _rename(row, f"{name}_messages", name)
    if "messages" in row and ("rejected" in row or not is_empty(row.get("rejected_response"))) and "chosen" not in row:
        return _adapt_swift(row)
    return row


def _adapt_openai(row: Raw) -> Raw:
    """Read OpenAI's preference format: a request, and two answers to it."""
    request = row["input"]
    others = {key: row[key] for key in row if key not in ("input", "preferred_output", "non_preferred_output")}
    extra = {f"input.{key}": request[key] for key in request if key not in ("messages", "tools")}
    adapted = {**others, **extra, "prompt": request.get("messages"), "chosen": row["preferred_output"]}
    if "non_preferred_output" in row:
        adapted["rejected"] = row["non_preferred_output"]
    return {**adapted, "tools": request["tools"]} if "tools" in request else adapted


def _adapt_answers(row: Raw) -> Raw:
    """Read an `output` that is a list: one answer, or a pair with the better one first."""
    answers = row["output"]
    if len(answers) == 1:
        return {**row, "output": answers[0]}
    if len(answers) != 2 or not all(isinstance(answer, str) for answer in answers):
        shown = ", ".join(sorted({describe(answer) for answer in answers})) or "nothing"
        raise RowError(
            f"output is a list of {len(answers)} ({shown}); expected a text, or two: the better answer first"
        )
    others = {key: value for key, value in row.items() if key != "output"}
    return {**others, "chosen": answers[0], "rejected": answers[1]}


def _adapt_swift(row: Raw) -> Raw:
    """Read a conversation whose last answer is the chosen one, beside the rejected answer or conversation."""
    others = {key: value for key, value in row.items() if key not in ("messages", "rejected_response", "rejected")}
    rejected = row.get("rejected", row.get("rejected_response"))
    messages = row["messages"]
    if isinstance(rejected, str) and isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
        last = messages[-1]
        text = "value" if "from" in last and "role" not in last else "content"
        rejected = [*messages[:-1], {**last, text: rejected}]
    return {**others, "chosen": messages, "rejected": rejected}


def _rename(row: Raw, old: str, new: str) -> Raw:
    return {new if key == old else key: value for key, value in row.items()}


def _parse_messages(text: str, key: str) -> list[Any] | None:
    """Return the messages that a text holds as JSON, or None where it is a text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        if key not in _LISTS:
            return None
        hint = "; it looks like Python's own notation: write it with json.dumps" if "'" in text else ""
        raise RowError(f"{key} is a text that is no JSON ({error}){hint}") from error
    messages = parsed if isinstance(parsed, list) else [parsed]
    is_chat = bool(messages) and all(
        isinstance(message, Mapping) and ({"role", "content"} <= message.keys() or {"from", "value"} <= message.keys())
        for message in messages
    )
    return messages if is_chat or key in _LISTS else None


def _is_firefly(turn: Mapping[str, Any]) -> bool:
    return "human" in turn and "assistant" in turn and "role" not in turn and "from" not in turn


def _split_turns(turns: list[Any]) -> list[Any]:
    """Return turns that hold a question and its answer as two messages each; other keys stay with the answer."""
    messages: list[Any] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not _is_firefly(turn):
            messages.append(turn)
            continue
        others = {key: value for key, value in turn.items() if key not in ("human", "assistant")}
        messages.append({"role": "user", "content": turn["human"]})
        messages.append({**others, "role": "assistant", "content": turn["assistant"]})
    return messages


def _read_transcripts(row: Raw) -> dict[str, Any]:
    """Return the values that are transcripts as messages; a pair is read so only where both its answers are, or its prompt is."""
    found = {
        key: turns
        for key in _TEXTS_OR_LISTS
        if isinstance(value := row.get(key), str) and (turns := _read_transcript(value, key)) is not None
    }
    if "prompt" in found:
        # The answers stand beside the prompt: a transcript ends in a space before them.
        answers = {
            key: row[key].strip() for key in ("completion", "chosen", "rejected") if isinstance(row.get(key), str)
        }
        return {**answers, **found}
    sides = found.keys() & {"chosen", "rejected"}
    if len(sides) == 1 and {"chosen", "rejected"} <= row.keys():
        other = ({"chosen", "rejected"} - sides).pop()
        raise RowError(
            f"{sides.pop()} is a text with Human: and Assistant:, and {other} is not; write both in the same way"
        )
    return found if len(sides) == 2 else {}


def _read_transcript(text: str, key: str) -> list[dict[str, str]] | None:
    """Return the turns of a text that begins with `Human:` and has an `Assistant:`, or None for another text.

    A prompt ends in an empty turn of the assistant, which is left out; elsewhere it is an empty answer.
    """
    text = text.strip()
    if not text.startswith("Human:"):
        return None
    _, *parts = _SPEAKER.split(f"\n\n{text}")
    turns = [
        {"role": _SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if all(turn["role"] == "user" for turn in turns):
        return None
    is_open = key == "prompt" and turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if is_open else turns
