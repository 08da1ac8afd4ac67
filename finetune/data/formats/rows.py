"""The row that every format is read into, its hash and its checks."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finetune.data.formats.messages import THOUGHTS, Message, RowError
from finetune.data.formats.turns import begins_with_greeting, check_order, merge_pair, merge_turns
from finetune.data.settings import RowShape, TrainOn
from finetune.errors import DataError, Place

RowKind = Literal["conversation", "preference", "labelled", "text", "tokens", "prompt"]


@dataclass(frozen=True)
class Row:
    """A row as read; its kind decides which fields are filled.

    `messages` is the whole conversation of a `conversation` or `labelled` row. It is the prompt of a `preference` row, whose two
    answers are `chosen` and `rejected`, and of a `prompt` row, whose reference answer is `answer`. `is_trained` is false where the
    file marks the whole row as not trained. `unused` names the keys of the file's row that nothing reads, `remarks` says what is
    read in another way than it is written.
    """

    messages: list[Message] = field(default_factory=list)
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    label: bool | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    answer: str | None = None
    tools: list[dict[str, Any]] | None = None
    is_trained: bool = True
    unused: tuple[str, ...] = field(default=(), compare=False, repr=False)
    remarks: tuple[str, ...] = field(default=(), compare=False, repr=False)


def hash_row(row: Row) -> bytes:
    """Return a hash of all that is asked and trained: rows with the same hash are the same row."""
    return hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class TextSample:
    """A row as it was read, with the first tokens that were made of it, so that another tokenizer can be held against them.

    `row` holds those fields of `Row` that are filled. `token_ids` has one list for each side of each row that was made of it.
    """

    kind: RowKind
    shape: RowShape
    row: dict[str, Any]
    token_ids: list[list[int]]


def join_turns(row: Row) -> Row:
    """Return a row whose turns of one speaker are joined, on both sides of a pair.

    Raises:
        RowError: turns cannot be joined.
    """
    if row.chosen and row.rejected:
        messages, chosen, rejected = merge_pair(row.messages, row.chosen, row.rejected)
        return replace(row, messages=messages, chosen=chosen, rejected=rejected)
    return replace(row, messages=merge_turns(row.messages))


def as_prompt(row: Row, place: Place) -> Row:
    """Return a row as a prompt with its reference answer: a conversation's last answer, or a pair's chosen answer.

    Raises:
        DataError: the prompt does not end with the user, or the row holds tools, which a prompt cannot have.
    """
    messages, answers = row.messages, row.chosen
    if not answers and messages and messages[-1]["role"] == "assistant":
        messages, answers = messages[:-1], messages[-1:]
    try:
        check_order(messages, ends_with="user")
        if row.tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
            raise RowError("holds tools; a prompt is plain turns")
        if any(key in message for message in messages for key in THOUGHTS):
            raise RowError("holds thoughts; a prompt is plain turns")
    except RowError as error:
        raise DataError(f"cannot be asked: {error}", place, error.kind) from error
    answer = str(answers[-1]["content"]) if answers else row.answer
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Row(turns, answer=answer or None)


def check_pair(row: Row) -> None:
    """Check that the two sides of a pair are one answer each to the same prompt.

    Raises:
        RowError: the sides differ before their last answer.
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


def check_marks(row: Row, shape: RowShape, train_on: TrainOn) -> None:
    """Check that the marks of messages can be honoured: a pair trains its answers, and `train_on: all` the whole text.

    Raises:
        RowError: a message is marked as not trained, and would be trained.
    """
    if shape == "sequence":
        messages, reason = [*row.messages, *row.chosen], "data.train_on: all trains the whole text"
        messages = messages if train_on == "all" else []
    else:
        messages, reason = [*row.messages[-1:], *row.chosen, *row.rejected], "this method trains each answer"
        messages = [message for message in messages if message["role"] == "assistant"]
    if shape != "prompt" and any("train" in message for message in messages):
        raise RowError(f"holds a message that is marked as not trained, but {reason}; remove the mark or the row")


def has_only_untrained(row: Row, train_on: TrainOn) -> bool:
    """Tell whether every answer of a conversation that could be trained is marked as not trained."""
    turns = [*row.messages, *row.chosen]
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last" else answers[1:] if begins_with_greeting(turns) else answers
    return train_on != "all" and bool(answers) and not any(turn.get("train", True) for turn in answers)


def check_row(kind: RowKind, row: Row) -> None:
    """Check the order of a row's messages, on both sides of a pair.

    Raises:
        RowError: a message is out of order.
    """
    if kind == "preference":
        for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
            try:
                check_order([*row.messages, *answer])
            except RowError as error:
                raise RowError(f"{name}: {error}", error.kind) from error
    elif kind == "prompt":
        check_order(row.messages, ends_with="user")
    elif kind not in ("text", "tokens"):
        check_order(row.messages)
