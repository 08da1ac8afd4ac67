"""Turn rows into tokens in batches: one thread renders a batch while another tokenizes the batch before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy

from finetune.data.encoding.gates import IGNORED_LABEL, describe_bos_fault, describe_row_fault
from finetune.data.encoding.rendering import (
    ChatTemplate,
    Rendered,
    encode_prompt,
    read_tokens,
    render_conversations,
    tokenize_rendered,
)
from finetune.data.encoding.spellings import Span, TokenSpans, encode_plain_texts
from finetune.data.encoding.template import list_stop_tokens
from finetune.data.formats.messages import Message
from finetune.data.formats.rows import Row, RowKind
from finetune.data.formats.turns import begins_with_greeting
from finetune.data.settings import RowShape, TrainOn
from finetune.errors import Place, TemplateError, describe_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
_Tokenized = tuple[list[Any], list[TokenSpans]]


@dataclass(frozen=True)
class SourceRow:
    """A row as read, with its place and its number (from 0) among all rows that were read."""

    number: int
    place: Place
    kind: RowKind
    row: Row


@dataclass(frozen=True)
class TokenRow:
    """A row as tokens.

    `spans` holds the trained runs as `(first, after the last)`. `full_length` is the length in tokens before the row was cut,
    for a pair that of its longer side. A pair has its chosen side in `token_ids` and the other side in `rejected`; both begin
    with the prompt. Pairs and labelled answers have one span, which begins where the prompt ends.
    """

    source: SourceRow
    token_ids: list[int]
    spans: list[Span]
    full_length: int
    is_cut: bool = False
    rejected: list[int] | None = None
    label: bool | None = None

    @property
    def sides(self) -> list[list[int]]:
        """The token ids that the model reads: one list, or two for a pair."""
        return [self.token_ids] if self.rejected is None else [self.token_ids, self.rejected]

    @property
    def trained_tokens(self) -> int:
        """The number of trained tokens, on both sides of a pair."""
        answer = 0 if self.rejected is None or not self.spans else len(self.rejected) - self.spans[0][0]
        return answer + sum(end - start for start, end in self.spans)


class RowEncoder:
    """Turns rows into tokens with one tokenizer and template.

    `train_on` chooses the trained turns of rows of the shape `sequence`. `rows_with_spellings` counts the conversations whose
    text holds the spelling of a control token. `refused` holds the rows that the template refuses, each with its fault.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        train_on: TrainOn,
        shape: RowShape = "sequence",
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._shape = shape
        self._stop_tokens = list_stop_tokens(tokenizer, template)
        self.rows_with_spellings = 0
        self.refused: list[tuple[SourceRow, str]] = []

    def encode(self, rows: Iterable[SourceRow]) -> Iterator[list[TokenRow]]:
        """Yield batches of up to `BATCH_ROWS` rows, in their order, without those that the template refuses.

        Raises:
            TemplateError: the template renders a prompt differently before each of two answers, or refuses a bare prompt.
        """
        pending: deque[tuple[list[SourceRow], Rendered, Future[_Tokenized]]] = deque()
        remaining = iter(rows)
        with ThreadPoolExecutor(1) as executor:
            while batch := list(islice(remaining, BATCH_ROWS)):
                try:
                    rendered = self._render(batch)
                except TemplateError:
                    batch = self._leave_out_refused(batch)
                    rendered = self._render(batch)
                # The tokenizer releases Python's lock and uses several cores; meanwhile this thread finds spans and renders.
                pending.append((batch, rendered, executor.submit(self._tokenize, batch, rendered)))
                if len(pending) > 1:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())

    def _leave_out_refused(self, batch: Sequence[SourceRow]) -> list[SourceRow]:
        kept = []
        for source in batch:
            try:
                conversations = list_sides(source.row, source.kind, self._shape) if _is_chat(source) else []
                render_conversations(
                    self._tokenizer, self._template, conversations, [source.row.tools] * len(conversations)
                )
                kept.append(source)
            except TemplateError as error:
                self.refused.append((source, str(error)))
        return kept

    def _render(self, batch: Sequence[SourceRow]) -> Rendered:
        sides = [
            (side, source.row.tools)
            for source in batch
            if _is_chat(source)
            for side in list_sides(source.row, source.kind, self._shape)
        ]
        if not sides:
            return Rendered([], [], [])
        messages = [side for side, _ in sides]
        rendered = render_conversations(self._tokenizer, self._template, messages, [tools for _, tools in sides])
        self.rows_with_spellings += sum(bool(marks) for marks in rendered.hidden)
        triples = zip(rendered.spans, rendered.texts, messages, strict=True)
        return Rendered(
            rendered.texts, [self._choose_spans(spans, text, own) for spans, text, own in triples], rendered.hidden
        )

    def _choose_spans(self, spans: list[Span], text: str, messages: Sequence[Message]) -> list[Span]:
        """Return those of the marked spans, in characters, that `train_on` and the messages' own `train` select."""
        if self._shape != "sequence":
            return spans[-1:]
        if self._train_on == "all":
            return [(len(str(self._tokenizer.bos_token)), len(text))]
        if self._train_on == "last":
            spans = spans[-1:]
        if begins_with_greeting(messages) and len(spans) > 1:
            spans = spans[1:]
        if not any("train" in message for message in messages):
            return spans
        answers = [message for message in messages if message["role"] == "assistant"][-len(spans) :]
        if len(answers) != len(spans):
            raise TemplateError(f"{self._template.name}: marks {len(spans)} spans for {len(answers)} answers")
        return [span for span, answer in zip(spans, answers, strict=True) if answer.get("train", True)]

    def _tokenize(self, batch: Sequence[SourceRow], rendered: Rendered) -> _Tokenized:
        texts = [source.row.text for source in batch if source.kind == "text"]
        return tokenize_rendered(self._tokenizer, rendered), encode_plain_texts(self._tokenizer, texts)

    def _finish(self, batch: list[SourceRow], rendered: Rendered, future: Future[_Tokenized]) -> list[TokenRow]:
        tokenized, documents = future.result()
        chats, texts = iter(read_tokens(rendered, tokenized)), iter(documents)
        given = (TokenSpans(s.row.token_ids, [(0, len(s.row.token_ids))]) for s in batch if s.kind == "tokens")
        whole = {"text": texts, "tokens": given}
        rows: list[TokenRow] = []
        for source in batch:
            if self._shape == "prompt":
                ids = encode_prompt(self._tokenizer, self._template, source.row.messages)
                rows.append(TokenRow(source, ids, [], len(ids)))
                continue
            if self._shape == "sequence":
                side = next(whole.get(source.kind, chats))
                rows.append(TokenRow(source, side.token_ids, side.spans, len(side.token_ids)))
                continue
            # White space after the stop token belongs to the next turn.
            sides = [_cut_after_answer(next(chats)) for _ in list_sides(source.row, source.kind, self._shape)]
            rows += [self._join_pair(source, *sides)] if self._shape == "pair" else _label_sides(source, sides)
        return rows

    def _join_pair(self, source: SourceRow, chosen: TokenSpans, rejected: TokenSpans) -> TokenRow:
        # A tokenizer may merge the prompt's last characters with an answer's first; the prompt is what both sides share.
        start = min(chosen.spans[0][0], rejected.spans[0][0])
        if chosen.token_ids[:start] != rejected.token_ids[:start]:
            raise TemplateError(
                f"{self._template.name}: {source.place}: the prompt is rendered differently before its two answers"
            )
        longest = max(len(chosen.token_ids), len(rejected.token_ids))
        span = (start, len(chosen.token_ids))
        return TokenRow(source, chosen.token_ids, [span], longest, rejected=rejected.token_ids)

    def describe(self) -> tuple[str, ...]:
        """Return a sentence for the report where texts spell control tokens."""
        if not (count := self.rows_with_spellings):
            return ()
        rows = describe_count(count, "row spells control tokens in its text", "rows spell control tokens in their text")
        return (f"{rows}; there they are plain text",)

    def find_fault(self, row: TokenRow) -> str | None:
        """Return why a row must not be trained, or None."""
        if row.source.kind == "tokens":
            highest, size = max(row.token_ids), len(self._tokenizer)
            return None if highest < size else f"holds token {highest}; the tokenizer has {size:,}, from 0 on"
        if self._shape == "prompt":
            return describe_bos_fault(row.token_ids, self._tokenizer)
        last = len(row.token_ids)
        may_lack_stop = (
            row.is_cut or (self._shape == "sequence" and self._train_on == "all") or row.source.kind == "text"
        )
        is_sound = (
            all(ids[0] == self._tokenizer.bos_token_id and ids.count(ids[0]) == 1 for ids in row.sides)
            and bool(row.spans)
            and all(
                row.token_ids[end - 1] in self._stop_tokens or (may_lack_stop and end == last) for _, end in row.spans
            )
        )
        if is_sound and row.rejected is None:
            return None
        if row.rejected == row.token_ids:
            return (
                "chosen and rejected are the same, so the pair prefers neither; remove it (`finetune lint --fix` does)"
            )
        for ids in row.sides:
            labels = make_labels(row).tolist() if ids is row.token_ids else _label_answer(ids, row.spans[0][0])
            if fault := describe_row_fault(ids, labels, self._tokenizer, self._stop_tokens, is_cut=may_lack_stop):
                return fault if row.rejected is None else f"{'chosen' if ids is row.token_ids else 'rejected'}: {fault}"
        return None


def list_sides(row: Row, kind: RowKind, shape: RowShape) -> list[list[Message]]:
    """Return the conversations of a row: one, or two for a pair that is trained on both sides."""
    sides = [[*row.messages, *row.chosen]]
    if kind == "preference" and shape != "sequence":
        sides.append([*row.messages, *row.rejected])
    return sides


def _is_chat(source: SourceRow) -> bool:
    return source.kind not in ("text", "tokens", "prompt")


def _cut_after_answer(side: TokenSpans) -> TokenSpans:
    return TokenSpans(side.token_ids[: side.spans[-1][1]], side.spans)


def _label_sides(source: SourceRow, sides: Sequence[TokenSpans]) -> list[TokenRow]:
    """Return a row with its label, or the two answers of a pair as one liked and one disliked row."""
    labels = [source.row.label] if len(sides) == 1 else [True, False]
    return [
        TokenRow(source, side.token_ids, side.spans, len(side.token_ids), label=label)
        for side, label in zip(sides, labels, strict=True)
    ]


def _label_answer(token_ids: Sequence[int], start: int) -> list[int]:
    return [IGNORED_LABEL] * start + list(token_ids[start:])


def cut_row(row: TokenRow, limit: int) -> TokenRow:
    """Return the first `limit` tokens of a row.

    Spans that begin after the limit are dropped. A pair loses its span where its cut sides are equal or hold no answer.
    """
    spans = [(start, min(end, limit)) for start, end in row.spans if start < limit]
    token_ids, rejected = row.token_ids[:limit], None if row.rejected is None else row.rejected[:limit]
    if token_ids == rejected or (rejected is not None and spans and len(rejected) <= spans[0][0]):
        spans = []
    return TokenRow(row.source, token_ids, spans, row.full_length, True, rejected, row.label)


def split_text_row(row: TokenRow, limit: int) -> list[TokenRow]:
    """Return a long text as pieces of up to `limit` tokens, each with bos at its start; no token is lost."""
    bos, tokens = row.token_ids[0], row.token_ids[1:]
    pieces = [[bos, *tokens[start : start + limit - 1]] for start in range(0, len(tokens), limit - 1)]
    return [
        TokenRow(row.source, piece, [(1, len(piece))], row.full_length, number < len(pieces))
        for number, piece in enumerate(pieces, 1)
    ]


def make_labels(row: TokenRow) -> Any:
    """Return the labels of a row, int32, shape `(tokens,)`: the token ids within spans, -100 elsewhere."""
    labels = numpy.full(len(row.token_ids), IGNORED_LABEL, dtype=numpy.int32)
    for start, end in row.spans:
        labels[start:end] = row.token_ids[start:end]
    return labels
