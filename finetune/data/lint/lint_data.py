"""Lint the rows of a recipe, and write those that pass."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.spellings import list_control_spellings
from finetune.data.lint.findings import LintReport, LintRow, LintSettings
from finetune.data.lint.lint_pass import lint_rows
from finetune.data.lint.lint_reader import read_lint_rows
from finetune.data.lint.row_writer import RowWriter
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
        writer = RowWriter(folder)
        try:
            return lint_rows(rows, settings, lambda row: writer.write(row.split, row.place.file, row.raw))
        finally:
            writer.close()
