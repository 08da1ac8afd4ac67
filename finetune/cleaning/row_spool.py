"""Keep the rows of a cleaning on disk: in memory each row has its place, its hash and what was found in it."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.formats.messages import Message
from finetune.data.formats.rows import hash_row
from finetune.data.lint.findings import LintRow
from finetune.data.lint.row_writer import write_as_text
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


class RowSpool:
    """A temporary file of rows, which the system removes with the process."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the spool
        self._end = 0

    def add(self, number: int, row: LintRow, found: Mapping[str, str]) -> Candidate:
        """Write a row, and return what stays of it in memory."""
        content = [row.raw, row.messages, row.rejected or (), row.row.tools, bool(row.row.text)]
        line = json.dumps(content, default=write_as_text).encode() + b"\n"
        self._file.seek(self._end)
        self._file.write(line)
        fault = row.fault[0] if row.fault else None
        made = Candidate(number, row.place, self._end, row.tokens, hash_row(row.row), found or _NOTHING, fault)
        self._end += len(line)
        return made

    def read(self, row: Candidate) -> SpooledRow:
        """Return the content of a row."""
        self._file.seek(row.offset)
        raw, messages, rejected, tools, is_text = json.loads(self._file.readline())
        return SpooledRow(raw, messages, rejected, tools, is_text)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


_NOTHING: Mapping[str, str] = {}
