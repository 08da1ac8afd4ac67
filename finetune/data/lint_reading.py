"""Read the rows of a recipe for `lint`, and write those that pass.

Unlike training, which stops at the first bad file, this reads on: what cannot be read is a row with a fault.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from finetune.data.dataset import DataSettings
from finetune.data.files import read_file
from finetune.data.lint import LintReport, LintRow, LintSettings, Split, lint_rows
from finetune.data.rows import Format, Message, choose_format, read_row
from finetune.data.template import ChatTemplate, Encoded, encode_conversations
from finetune.errors import DataError, TemplateError
from finetune.folders import write_folder

_BATCH_ROWS = 500
# What `data/rows.py` says of a row, and the kind of finding that it is; anything else is "unreadable".
_FAULT_KINDS = {
    "turns must alternate": "role_order",
    "it may only come first": "role_order",
    "the conversation ends with": "role_order",
    "is empty": "empty_text",
}
# JSON can spell half of a character that needs two UTF-16 units; no tokenizer takes such text.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_HALF_CHARACTER = "the text holds half of a character (an escape between \\ud800 and \\udfff without its partner)"


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


def list_control_spellings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts that the tokenizer would read as control tokens, the longest first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text)))


def read_lint_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[LintRow]:
    """Yield every row of a recipe, those to evaluate on first, with its tokens or with its fault."""
    splits: tuple[tuple[Split, Sequence[Path]], ...] = (("evaluation", settings.evaluation), ("train", settings.train))
    for split, paths in splits:
        for path in paths:
            read = _read_rows(path, split, settings)
            while batch := list(itertools.islice(read, _BATCH_ROWS)):
                yield from _encode_rows(batch, tokenizer, template)


def _read_rows(path: Path, split: Split, settings: DataSettings) -> Iterator[LintRow]:
    entry: Format | None = None
    source = str(path)
    raw_rows = read_file(path)
    while True:
        try:
            where, raw = next(raw_rows)
        except StopIteration:
            return
        except DataError as error:
            where, _, fault = str(error).partition(": ")
            yield LintRow(where, source, split, fault=("unreadable", f"{fault}; what follows it was not read"))
            return
        try:
            entry = entry or choose_format(settings.format, settings.columns, raw, where)
            messages = _add_system(read_row(entry, settings.columns, raw, where), settings.system)
            if any(map(_is_broken, messages)):
                yield LintRow(where, source, split, raw=raw, fault=("unreadable", _HALF_CHARACTER))
            else:
                yield LintRow(where, source, split, messages, raw=raw)
        except DataError as error:
            yield LintRow(where, source, split, raw=raw, fault=_name_fault(str(error).removeprefix(f"{where}: ")))


def _add_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _is_broken(message: Message) -> bool:
    return _SURROGATE.search(message["content"]) is not None


def _name_fault(text: str) -> tuple[str, str]:
    return next((kind for phrase, kind in _FAULT_KINDS.items() if phrase in text), "unreadable"), text


def _encode_rows(
    batch: Sequence[LintRow], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Iterator[LintRow]:
    """Count the tokens of a batch; a row that the template refuses gets a fault."""
    readable = [row for row in batch if row.fault is None]
    try:
        encoded: Iterator[Encoded | str] = iter(
            encode_conversations(tokenizer, template, [row.messages for row in readable]) if readable else ()
        )
    except TemplateError:
        encoded = (_encode_one(row, tokenizer, template) for row in readable)
    for row in batch:
        if row.fault is not None:
            yield row
            continue
        result = next(encoded)
        if isinstance(result, str):
            yield replace(row, messages=(), fault=("unreadable", result))
        else:
            yield replace(row, tokens=len(result.token_ids), trained_tokens=sum(result.trained))


def _encode_one(row: LintRow, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Encoded | str:
    try:
        return encode_conversations(tokenizer, template, [row.messages])[0]
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
