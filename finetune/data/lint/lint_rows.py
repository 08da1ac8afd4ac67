"""Read the rows of a recipe for `lint`, and write those that pass.

Unlike training, which stops at the first bad file, this reads on: what cannot be read is a row with a fault.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from finetune.data.encoding.rendering import ChatTemplate, Encoded, encode_conversations
from finetune.data.encoding.spellings import encode_plain_texts, list_control_spellings
from finetune.data.formats.messages import Message, add_system
from finetune.data.formats.row_formats import Format, choose_format, read_row
from finetune.data.formats.rows import Row
from finetune.data.lint.findings import LintReport, LintRow, LintSettings, Split, lint_rows
from finetune.data.reading.raw_files import RawRow
from finetune.data.reading.sources import read_source
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, TemplateError
from finetune.files.folders import write_folder

_BATCH_ROWS = 500
# What `data/rows.py` says of a row, and the kind of finding that it is; anything else is "unreadable".
_FAULT_KINDS = {
    "turns must alternate": "role_order",
    "it may only come first": "role_order",
    "the conversation ends with": "role_order",
    "is empty": "empty_text",
}


@dataclass(frozen=True)
class _ReadRow:
    """A row for lint, and what it was read as where it could be read."""

    lint: LintRow
    row: Row | None = None


def lint_data(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, fixed: Path | None = None
) -> LintReport:
    """Lint all rows of a recipe; `fixed` is a new folder for the rows that pass, one JSONL file for each source.

    Raises:
        OutputError: the folder is not empty or cannot be written; nothing is left there.
    """
    rows = read_lint_rows(settings, tokenizer, template)
    lint_settings = LintSettings(settings.max_tokens, list_control_spellings(tokenizer))
    if fixed is None:
        return lint_rows(rows, lint_settings)
    with write_folder(fixed) as folder:
        writer = _RowWriter(folder)
        try:
            return lint_rows(rows, lint_settings, writer.write)
        finally:
            writer.close()


def read_lint_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[LintRow]:
    """Yield every row of a recipe, those to evaluate on first, with its tokens or with its fault."""
    splits: tuple[tuple[Split, Sequence[Source]], ...] = (
        ("evaluation", settings.evaluation),
        ("train", settings.train),
    )
    for split, sources in splits:
        for name, raw_rows in (part for source in sources for part in read_source(source)):
            read = _read_rows(name, raw_rows, split, settings)
            while batch := list(itertools.islice(read, _BATCH_ROWS)):
                yield from _encode_rows(batch, tokenizer, template)


def _read_rows(source: str, raw_rows: Iterator[RawRow], split: Split, settings: DataSettings) -> Iterator[_ReadRow]:
    entry: Format | None = None
    while True:
        try:
            where, raw = next(raw_rows)
        except StopIteration:
            return
        except DataError as error:
            where, _, fault = str(error).partition(": ")
            yield _ReadRow(
                LintRow(where, source, split, fault=("unreadable", f"{fault}; what follows it was not read"))
            )
            return
        try:
            entry = entry or choose_format(settings.format, settings.columns, raw, where)
            row = read_row(entry, settings.columns, raw, where)
        except DataError as error:
            named = _name_fault(str(error).removeprefix(f"{where}: "))
            yield _ReadRow(LintRow(where, source, split, raw=raw, fault=named))
            continue
        messages = _list_messages(row, settings.system)
        yield _ReadRow(LintRow(where, source, split, messages, row.rejected or None, raw=raw), row)


def _list_messages(row: Row, system: str | None) -> list[Message]:
    if row.text:
        return [{"role": "assistant", "content": row.text}]
    return add_system([*row.messages, *row.chosen], system)


def _name_fault(text: str) -> tuple[str, str]:
    return next((kind for phrase, kind in _FAULT_KINDS.items() if phrase in text), "unreadable"), text


def _encode_rows(
    batch: Sequence[_ReadRow], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[LintRow]:
    """Count the tokens of a batch; a row that the template refuses gets a fault."""
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


class _RowWriter:
    """Writes rows as they stood in their source, one file for each source that has any; of one name, the later get a number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[Split, str], IO[str]] = {}

    def write(self, row: LintRow) -> None:
        file = self._files.get((row.split, row.source)) or self._open(row.split, row.source)
        file.write(json.dumps(row.raw, ensure_ascii=False, default=_to_text) + "\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, split: Split, source: str) -> IO[str]:
        stem = Path(Path(source).name.removesuffix(".gz")).stem
        paths = (
            self._folder / f"{stem}{end}.jsonl" for end in itertools.chain([""], map("-{}".format, itertools.count(2)))
        )
        path = next(path for path in paths if not path.exists())
        # Half a character is written as the JSON escape that it was read from; line ends are the same on every system.
        file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._files[split, source] = file
        return file


def _to_text(value: Any) -> str:
    """Parquet holds dates and the like, for which JSON has only text."""
    return str(value)
