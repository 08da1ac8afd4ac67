"""Keep the rows of a cleaning on disk: in memory each row has its place, its hash and what was found in it."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.spellings import list_control_spellings
from finetune.data.formats.messages import Message
from finetune.data.formats.row_keys import PROVENANCE
from finetune.data.formats.rows import hash_row
from finetune.data.lint.findings import LintRow, LintSettings, Thresholds
from finetune.data.lint.lint_pass import check_row_text
from finetune.data.lint.lint_reader import read_lint_rows
from finetune.data.lint.row_writer import write_as_text
from finetune.data.settings import DataSettings
from finetune.errors import Place


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that may stay: its number, its place, where its content lies in the spool, and what was found in it by itself.

    `found` maps kinds of findings to their texts. `fault` is the kind of a row that cannot be read as one, else None.
    """

    number: int
    place: Place
    offset: int
    tokens: int
    digest: bytes
    found: Mapping[str, str]
    fault: str | None


@dataclass(frozen=True)
class SpooledRow:
    """The content of a row: `raw` as it stands in its file, `messages` as it is trained; plain text is one message."""

    raw: dict[str, Any] | None
    messages: Sequence[Message]
    rejected: Sequence[Message]
    tools: list[dict[str, Any]] | None
    is_text: bool

    @property
    def question(self) -> str:
        """All that the user says."""
        return _join(self.messages, "user")

    @property
    def trained(self) -> str:
        """All that the assistant says."""
        return _join(self.messages, "assistant")

    @property
    def last_answer(self) -> str:
        """The last thing that the assistant says."""
        return next((turn["content"] for turn in reversed(self.messages) if turn["role"] == "assistant"), "")


def _join(messages: Sequence[Message], role: str) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == role)


def write_content(row: LintRow) -> str:
    """Return the content of a row as one line of ASCII."""
    content = [row.raw, row.messages, row.rejected or (), row.row.tools, bool(row.row.text)]
    return json.dumps(content, default=write_as_text)


def read_content(line: str | bytes) -> SpooledRow:
    """Return the content of a row from its line."""
    raw, messages, rejected, tools, is_text = json.loads(line)
    return SpooledRow(raw, messages, rejected, tools, is_text)


def add_provenance(
    raw: Mapping[str, Any], place: Place, passed: Sequence[str], scores: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return a row as it is written: with its place, the steps that it has passed, its scores, and an earlier provenance."""
    own: dict[str, Any] = {"file": Path(place.file).name, place.unit: place.line, "passed": list(passed)}
    if scores is not None:
        own["scores"] = scores
    if raw.get(PROVENANCE) is not None:
        own["before"] = raw[PROVENANCE]
    return {**raw, PROVENANCE: own}


def read_checked_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, thresholds: Thresholds
) -> Iterator[tuple[LintRow, dict[str, str]]]:
    """Yield every row to train on, with what is wrong with it by itself: kinds of findings and their texts."""
    lint_settings = LintSettings(settings.max_tokens, list_control_spellings(tokenizer), thresholds=thresholds)
    # The rows to evaluate on are no part of the training set; data.held_out is drawn by training itself.
    for row in read_lint_rows(replace(settings, evaluation=()), tokenizer, template):
        yield row, dict([row.fault] if row.fault else check_row_text(row, lint_settings))


class RowSpool:
    """A temporary file of rows, which the system removes with the process."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the spool
        self._end = 0

    def add(self, number: int, row: LintRow, found: Mapping[str, str]) -> Candidate:
        """Write a row, and return what stays of it in memory."""
        line = write_content(row).encode() + b"\n"
        self._file.seek(self._end)
        self._file.write(line)
        fault = row.fault[0] if row.fault else None
        made = Candidate(number, row.place, self._end, row.tokens, hash_row(row.row), found or _NOTHING, fault)
        self._end += len(line)
        return made

    def read(self, row: Candidate) -> SpooledRow:
        """Return the content of a row."""
        self._file.seek(row.offset)
        return read_content(self._file.readline())

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


_NOTHING: Mapping[str, str] = {}
