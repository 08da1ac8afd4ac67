"""Lint the rows of a recipe, and write those that pass."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.spellings import list_control_spellings
from finetune.data.lint.findings import LintReport, LintRow, LintSettings, Split
from finetune.data.lint.lint_pass import lint_rows
from finetune.data.lint.lint_reader import read_lint_rows
from finetune.data.reading.sources import describe_sources
from finetune.data.settings import DataSettings
from finetune.files.folders import write_folder


def lint_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    fixed: Path | None = None,
    only: frozenset[str] | None = None,
) -> LintReport:
    """Lint all rows of a recipe. Write the rows that pass into the new folder `fixed`, one JSONL file for each source file.

    `only` names the kinds of findings whose rows are left out there, in place of those that `KINDS` chooses.

    Raises:
        OutputError: the folder is not empty or cannot be written; nothing is left there.
    """
    lint_settings = LintSettings(settings.max_tokens, list_control_spellings(tokenizer))
    if only is not None:
        lint_settings = replace(lint_settings, dropped=only)
    rows = read_lint_rows(settings, tokenizer, template)
    report = lint_rows(rows, lint_settings) if fixed is None else _lint_and_write(rows, lint_settings, fixed)
    return replace(report, notes=(*describe_sources((*settings.train, *settings.evaluation)), *report.notes))


def _lint_and_write(rows: Iterable[LintRow], settings: LintSettings, fixed: Path) -> LintReport:
    with write_folder(fixed) as folder:
        writer = _RowWriter(folder)
        try:
            return lint_rows(rows, settings, writer.write)
        finally:
            writer.close()


class _RowWriter:
    """Writes rows as they stood in their source, one file for each source file. Files of the same name get a number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[Split, str], IO[str]] = {}

    def write(self, row: LintRow) -> None:
        """Write a row into the file for its source."""
        source = row.place.file
        file = self._files.get((row.split, source)) or self._open(row.split, source)
        file.write(json.dumps(row.raw, ensure_ascii=False, default=_to_text) + "\n")

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _open(self, split: Split, source: str) -> IO[str]:
        stem = Path(Path(source).name.removesuffix(".gz")).stem
        paths = (
            self._folder / f"{stem}{end}.jsonl" for end in itertools.chain([""], map("-{}".format, itertools.count(2)))
        )
        path = next(path for path in paths if not path.exists())
        # A lone surrogate is written as the JSON escape that it was read from; line ends are the same on every system.
        file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._files[split, source] = file
        return file


def _to_text(value: Any) -> str:
    """Return a value that JSON cannot hold, such as a date from Parquet, as text."""
    return str(value)
