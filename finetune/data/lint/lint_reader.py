"""Read the rows of a recipe for `lint`.

Training stops at the first file that cannot be read. `lint` reads the other files too, and reports a row with a fault instead.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from finetune.data.encoding.rendering import ChatTemplate, Encoded, encode_conversations
from finetune.data.encoding.spellings import encode_plain_texts
from finetune.data.encoding.template import list_rendered_thoughts
from finetune.data.formats.messages import Message
from finetune.data.formats.row_formats import Format, choose_format, read_row
from finetune.data.formats.row_keys import Rendered
from finetune.data.formats.rows import Row
from finetune.data.formats.turns import add_system
from finetune.data.lint.findings import LintRow, Split
from finetune.data.reading.arrow_rows import RawRow
from finetune.data.reading.sources import read_source
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, Place, TemplateError

_BATCH_ROWS = 500


@dataclass(frozen=True)
class _ReadRow:
    """A row for lint; `row` is None where it could not be read."""

    lint: LintRow
    row: Row | None = None


def read_lint_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[LintRow]:
    """Yield every row of a recipe with its tokens or its fault, the rows for evaluation first."""
    rendered = list_rendered_thoughts(tokenizer, template)
    splits: tuple[tuple[Split, Sequence[Source]], ...] = (
        ("evaluation", settings.evaluation),
        ("train", settings.train),
    )
    for split, sources in splits:
        for name, raw_rows in (part for source in sources for part in read_source(source)):
            read = _read_rows(name, raw_rows, split, settings, rendered)
            while batch := list(itertools.islice(read, _BATCH_ROWS)):
                yield from _encode_rows(batch, tokenizer, template)


def _read_rows(
    file: str, raw_rows: Iterator[RawRow], split: Split, settings: DataSettings, rendered: Rendered
) -> Iterator[_ReadRow]:
    """Yield the rows of a file. Where the file cannot be read on, the last row yielded says so in its fault."""
    entry: Format | None = None
    is_begun = False
    try:
        for place, raw in raw_rows:
            is_begun = True
            if isinstance(raw, DataError):
                yield _ReadRow(LintRow(place, split, fault=(raw.kind, raw.fault)))
                continue
            try:
                entry = entry or choose_format(settings.format, settings.columns, raw, place)
                row = read_row(entry, settings.columns, raw, place, rendered, merge_turns=settings.merge_turns)
            except DataError as error:
                yield _ReadRow(LintRow(place, split, raw=raw, fault=(error.kind, error.fault)))
                continue
            messages = _list_messages(row, settings.system)
            yield _ReadRow(LintRow(place, split, messages, row.rejected or None, raw=raw, row=row), row)
    except DataError as error:
        # Of a file that is empty, or that cannot be opened, nothing follows.
        more = "; what follows it was not read" if is_begun or (error.place and error.place.line is not None) else ""
        fault = ("unreadable", f"{error.fault}{more}")
        yield _ReadRow(LintRow(error.place or Place(file), split, fault=fault))


def _list_messages(row: Row, system: str | None) -> list[Message]:
    if row.text:
        return [{"role": "assistant", "content": row.text}]
    return add_system([*row.messages, *row.chosen], system)


def _encode_rows(
    batch: Sequence[_ReadRow], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[LintRow]:
    """Count the tokens of a batch of rows; a row that the template refuses gets a fault."""
    chats = [read for read in batch if read.row is not None and not read.row.text]
    try:
        encoded: Iterator[Encoded | str] = iter(_encode_chats(chats, tokenizer, template))
    except TemplateError:
        encoded = (_encode_one(chat, tokenizer, template) for chat in chats)
    for read in batch:
        row = read.lint
        if read.row is None:
            yield row
        elif read.row.text:
            (text,) = encode_plain_texts(tokenizer, [read.row.text])
            yield replace(row, tokens=len(text.token_ids), trained_tokens=len(text.token_ids) - 1)
        elif isinstance(result := next(encoded), str):
            yield replace(row, messages=(), rejected=None, fault=("unreadable", result))
        else:
            yield replace(row, tokens=len(result.token_ids), trained_tokens=sum(result.trained))


def _encode_chats(
    chats: Sequence[_ReadRow], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> list[Encoded]:
    if not chats:
        return []
    messages = [chat.lint.messages for chat in chats]
    return encode_conversations(tokenizer, template, messages, [chat.row.tools if chat.row else None for chat in chats])


def _encode_one(chat: _ReadRow, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Encoded | str:
    try:
        return _encode_chats([chat], tokenizer, template)[0]
    except TemplateError as error:
        return str(error)
