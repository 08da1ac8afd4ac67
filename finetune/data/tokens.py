"""Rows to tokens in batches: one thread renders while another tokenizes, and columns are built without a list per token."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy
import pyarrow
from transformers import PreTrainedTokenizerBase

from finetune.data.encoding import Span, TokenSpans, encode_plain_texts
from finetune.data.gates import IGNORED_LABEL, describe_bos_fault, describe_row_fault
from finetune.data.messages import Message
from finetune.data.rows import Row, RowKind
from finetune.data.settings import TrainOn
from finetune.data.template import (
    ChatTemplate,
    Rendered,
    encode_prompt,
    encode_rendered,
    list_stop_tokens,
    read_tokens,
    render_conversations,
    tokenize_rendered,
)
from finetune.errors import TemplateError

_BATCH_ROWS = 1000
_MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
_Tokenized = tuple[list[Any], list[TokenSpans]]


@dataclass(frozen=True)
class SourceRow:
    """A row as read, its place, and its number among all rows that were read."""

    number: int
    origin: str
    kind: RowKind
    row: Row


@dataclass(frozen=True)
class TokenRow:
    """A row as tokens; `spans` are its trained runs, `full_length` its tokens before a cut."""

    source: SourceRow
    token_ids: list[int]
    spans: list[Span]
    full_length: int
    is_cut: bool = False
    pair: tuple[list[int], list[int], list[int]] | None = None


class RowEncoder:
    """Turn rows into tokens with one tokenizer, template and choice of what is trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._stop_tokens = list_stop_tokens(tokenizer, template)
        self._rows_with_spellings = 0

    def encode(self, rows: Iterable[SourceRow]) -> Iterator[list[TokenRow]]:
        """Yield batches of rows in their order.

        Raises:
            TemplateError: the template refuses a conversation.
        """
        pending: deque[tuple[list[SourceRow], Rendered, Future[_Tokenized]]] = deque()
        remaining = iter(rows)
        with ThreadPoolExecutor(1) as executor:
            while batch := list(islice(remaining, _BATCH_ROWS)):
                rendered = self._render(batch)
                # The tokenizer works outside of Python's lock, on all cores that it may use; the spans are found here meanwhile.
                pending.append((batch, rendered, executor.submit(self._tokenize, batch, rendered)))
                if len(pending) > 1:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())

    def _render(self, batch: Sequence[SourceRow]) -> Rendered:
        chats = [source for source in batch if source.kind not in ("text", "prompt")]
        messages = [_join(source.row) for source in chats]
        if not chats:
            return Rendered([], [], [])
        rendered = render_conversations(
            self._tokenizer, self._template, messages, [source.row.tools for source in chats]
        )
        self._rows_with_spellings += sum(bool(marks) for marks in rendered.hidden)
        triples = zip(rendered.spans, rendered.texts, messages, strict=True)
        return Rendered(
            rendered.texts, [self._choose_spans(spans, text, own) for spans, text, own in triples], rendered.hidden
        )

    def _choose_spans(self, spans: list[Span], text: str, messages: Sequence[Message]) -> list[Span]:
        if self._train_on == "all":
            return [(len(str(self._tokenizer.bos_token)), len(text))]
        if self._train_on == "last":
            spans = spans[-1:]
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
        return [
            self._make_row(source, self._encode_prompt(source))
            if source.kind == "prompt"
            else self._make_row(source, next(texts if source.kind == "text" else chats))
            for source in batch
        ]

    def _encode_prompt(self, source: SourceRow) -> TokenSpans:
        return TokenSpans(encode_prompt(self._tokenizer, self._template, source.row.messages), [])

    def _make_row(self, source: SourceRow, tokens: TokenSpans) -> TokenRow:
        pair = self._split_pair(source, tokens.token_ids)
        return TokenRow(source, tokens.token_ids, tokens.spans, len(tokens.token_ids), pair=pair)

    def _split_pair(self, source: SourceRow, chosen: list[int]) -> tuple[list[int], list[int], list[int]] | None:
        if source.kind != "preference":
            return None
        row = source.row
        prompt = encode_prompt(self._tokenizer, self._template, row.messages, row.tools)
        rendered = render_conversations(self._tokenizer, self._template, [[*row.messages, *row.rejected]], [row.tools])
        rejected = encode_rendered(self._tokenizer, rendered)[0].token_ids
        if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
            raise TemplateError(
                f"{self._template.name}: {source.origin}: the prompt is rendered differently before an answer"
            )
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]

    def describe(self) -> tuple[str, ...]:
        """Return what a person should know of the rows' texts."""
        count = self._rows_with_spellings
        return (f"{count:,} rows spell control tokens in their text; there they are plain text",) if count else ()

    def find_fault(self, row: TokenRow) -> str | None:
        """Return what forbids to train a row, or None."""
        ids, last = row.token_ids, len(row.token_ids)
        if row.source.kind == "prompt":
            return describe_bos_fault(ids, self._tokenizer)
        free = row.is_cut or self._train_on == "all" or row.source.kind == "text"
        is_sound = (
            ids[0] == self._tokenizer.bos_token_id
            and ids.count(ids[0]) == 1
            and bool(row.spans)
            and all(ids[end - 1] in self._stop_tokens or (free and end == last) for _, end in row.spans)
        )
        if is_sound:
            return None
        labels = make_labels(row).tolist()
        return describe_row_fault(ids, labels, self._tokenizer, self._stop_tokens, is_cut=free)


def _join(row: Row) -> list[Message]:
    return [*row.messages, *row.chosen]


def cut_row(row: TokenRow, limit: int) -> TokenRow:
    """Return the beginning of a row; a trained run that starts beyond the limit is gone."""
    spans = [(start, min(end, limit)) for start, end in row.spans if start < limit]
    return TokenRow(row.source, row.token_ids[:limit], spans, row.full_length, True, row.pair)


def split_text_row(row: TokenRow, limit: int) -> list[TokenRow]:
    """Return the pieces of a long text, each with bos at its start; every token of the text is in one of them."""
    bos, tokens = row.token_ids[0], row.token_ids[1:]
    pieces = [[bos, *tokens[start : start + limit - 1]] for start in range(0, len(tokens), limit - 1)]
    return [
        TokenRow(row.source, piece, [(1, len(piece))], row.full_length, number < len(pieces))
        for number, piece in enumerate(pieces, 1)
    ]


def make_labels(row: TokenRow) -> Any:
    """Return the labels of a row, shape `(tokens,)`."""
    labels = numpy.full(len(row.token_ids), IGNORED_LABEL, dtype=numpy.int32)
    for start, end in row.spans:
        labels[start:end] = row.token_ids[start:end]
    return labels


def make_record_batch(rows: Sequence[TokenRow]) -> pyarrow.RecordBatch:
    """Return rows as Arrow columns: `input_ids`, `labels`, `origin`, `is_cut`; for pairs their parts, for prompts their texts."""
    columns = {
        "input_ids": _make_lists([row.token_ids for row in rows]),
        "labels": _make_lists([make_labels(row) for row in rows]),
        "origin": pyarrow.array([row.source.origin for row in rows], pyarrow.string()),
        "is_cut": pyarrow.array([row.is_cut for row in rows], pyarrow.bool_()),
    }
    pairs = [row.pair for row in rows if row.pair is not None]
    if pairs:
        for position, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids")):
            columns[name] = _make_lists([pair[position] for pair in pairs])
    if rows and rows[0].source.kind == "prompt":
        columns["prompt"] = pyarrow.array([row.source.row.messages for row in rows], _MESSAGES)
        columns["answer"] = pyarrow.array([row.source.row.answer for row in rows], pyarrow.string())
    return pyarrow.RecordBatch.from_pydict(columns)


def _make_lists(values: Sequence[Any]) -> Any:
    lengths = numpy.fromiter(map(len, values), dtype=numpy.int32, count=len(values))
    offsets = numpy.concatenate([numpy.zeros(1, numpy.int32), numpy.cumsum(lengths, dtype=numpy.int32)])
    if values and isinstance(values[0], numpy.ndarray):
        flat = numpy.concatenate(values)
    else:
        flat = numpy.fromiter(chain.from_iterable(values), dtype=numpy.int32, count=int(offsets[-1]))
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))
