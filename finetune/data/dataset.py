"""Files to rows to tokens: the splits that a run trains and evaluates on, with an account of every row."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.files import read_file
from finetune.data.gates import IGNORED_LABEL, check_padding, check_rows, describe_row_fault
from finetune.data.rows import Message, choose_format, read_row
from finetune.data.template import ChatTemplate, encode_conversations, list_stop_tokens
from finetune.errors import DataError

_BATCH_ROWS = 1000
_MOST_FAULTS = 1000


@dataclass(frozen=True)
class DataSettings:
    """What a recipe says about its rows; `held_out` is a share below 1 or a number of rows."""

    train: tuple[Path, ...]
    evaluation: tuple[Path, ...] = ()
    held_out: int | float = 0
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    max_tokens: int = 2048
    overflow: Literal["error", "drop", "truncate"] = "error"


@dataclass(frozen=True)
class SplitReport:
    """The account of one split: `rows_read` = `rows` + `dropped`; lengths are in tokens."""

    rows_read: int
    rows: int
    dropped: int
    truncated: int
    answers_cut: int
    tokens: int
    trained_tokens: int
    longest: int
    median: int
    histogram: list[tuple[int, int]]


@dataclass(frozen=True)
class DataReport:
    """The account of all rows; `formats` says for each file how its rows were read."""

    train: SplitReport
    evaluation: SplitReport | None
    formats: dict[str, str]
    template: str
    template_fingerprint: str
    fingerprint: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """Return one line for a person."""
        parts = [
            f"{self.train.rows:,} for training ({self.train.trained_tokens:,} of {self.train.tokens:,} tokens trained)"
        ]
        if self.evaluation is not None:
            parts.append(f"{self.evaluation.rows:,} held out")
        for name in ("dropped", "truncated", "answers_cut"):
            count = sum(vars(split)[name] for split in (self.train, self.evaluation) if split is not None)
            if count:
                parts.append(f"{count:,} {name.replace('_', ' ')}")
        return f"{', '.join(parts)}; template {self.template}"


@dataclass(frozen=True)
class Splits:
    """Rows as tokens: columns `input_ids`, `labels` (-100 where untrained), `origin` (file and line), `is_cut`."""

    train: Dataset
    evaluation: Dataset | None
    report: DataReport


@dataclass(frozen=True)
class _SourceRow:
    origin: str
    messages: list[Message]


@dataclass(frozen=True)
class _TokenRow:
    origin: str
    input_ids: list[int]
    labels: list[int]
    is_cut: bool


def load_splits(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, seed: int
) -> Splits:
    """Read, split, render and tokenize the rows of a recipe.

    Raises:
        DataError: files or rows that cannot be used, with their lines; rows that are too long, where no policy says what to do.
    """
    check_padding(tokenizer, list_stop_tokens(tokenizer, template))
    formats: dict[str, str] = {}
    train = list(_read_rows(settings.train, settings, formats))
    held_out = list(_read_rows(settings.evaluation, settings, formats))
    if settings.held_out:
        train, held_out = _hold_out(train, settings.held_out, seed)
    train_rows, train_report = _make_split(train, settings, tokenizer, template)
    if not train_rows:
        raise DataError(
            f"no row is left for training: all {len(train):,} exceed data.max_tokens: {settings.max_tokens}"
        )
    held_rows, held_report = _make_split(held_out, settings, tokenizer, template) if held_out else ([], None)
    if held_out and not held_rows:
        raise DataError(f"no held-out row is left: all {len(held_out):,} exceed data.max_tokens: {settings.max_tokens}")
    report = DataReport(
        train=train_report,
        evaluation=held_report,
        formats=formats,
        template=template.name,
        template_fingerprint=template.fingerprint,
        fingerprint=_fingerprint(train_rows, held_rows),
        notes=_note_losses(train_report, held_report, settings),
    )
    return Splits(_make_dataset(train_rows), _make_dataset(held_rows) if held_rows else None, report)


def _read_rows(paths: Sequence[Path], settings: DataSettings, formats: dict[str, str]) -> Iterator[_SourceRow]:
    faults: list[tuple[str, str]] = []
    for path in paths:
        entry = None
        for where, raw in read_file(path):
            if entry is None:
                entry = choose_format(settings.format, settings.columns, raw, where)
                formats[str(path)] = entry.name
            try:
                messages = read_row(entry, settings.columns, raw, where).messages
            except DataError as error:
                origin, _, fault = str(error).partition(": ")
                faults.append((origin, fault))
                if len(faults) >= _MOST_FAULTS:
                    break
                continue
            if settings.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": settings.system}, *messages]
            yield _SourceRow(where, messages)
    check_rows(faults)


def _hold_out(rows: list[_SourceRow], held_out: int | float, seed: int) -> tuple[list[_SourceRow], list[_SourceRow]]:
    count = held_out if isinstance(held_out, int) else max(1, round(len(rows) * held_out))
    if count >= len(rows):
        raise DataError(f"data.held_out: {count} of {len(rows)} rows would leave none for training; hold out fewer")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def _make_split(
    rows: Sequence[_SourceRow], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[list[_TokenRow], SplitReport]:
    encoded: list[_TokenRow] = []
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        for row, tokens in zip(
            batch, encode_conversations(tokenizer, template, [row.messages for row in batch]), strict=True
        ):
            pairs = zip(tokens.token_ids, tokens.trained, strict=True)
            labels = [token if is_trained else IGNORED_LABEL for token, is_trained in pairs]
            encoded.append(_TokenRow(row.origin, tokens.token_ids, labels, False))
    kept = _apply_overflow(encoded, settings)
    stop_tokens = list_stop_tokens(tokenizer, template)
    faults = [
        (row.origin, fault)
        for row in kept
        if (fault := describe_row_fault(row.input_ids, row.labels, tokenizer, stop_tokens, is_cut=row.is_cut))
    ]
    check_rows(faults)
    return kept, _count(kept, len(rows))


def _apply_overflow(rows: list[_TokenRow], settings: DataSettings) -> list[_TokenRow]:
    limit = settings.max_tokens
    long = [row for row in rows if len(row.input_ids) > limit]
    if not long:
        return rows
    if settings.overflow == "error":
        worst = max(long, key=lambda row: len(row.input_ids))
        raise DataError(
            f"{len(long):,} of {len(rows):,} rows are longer than data.max_tokens: {limit} (the longest has "
            f"{len(worst.input_ids):,} tokens: {worst.origin}); raise data.max_tokens, or say what to do with them: "
            "data.overflow: drop or truncate"
        )
    if settings.overflow == "drop":
        return [row for row in rows if len(row.input_ids) <= limit]
    cut = [row if len(row.input_ids) <= limit else _cut(row, limit) for row in rows]
    # A row whose answer starts beyond the limit would train nothing.
    return [row for row in cut if any(label != IGNORED_LABEL for label in row.labels)]


def _cut(row: _TokenRow, limit: int) -> _TokenRow:
    return _TokenRow(row.origin, row.input_ids[:limit], row.labels[:limit], True)


def _count(rows: Sequence[_TokenRow], rows_read: int) -> SplitReport:
    lengths = sorted(len(row.input_ids) for row in rows)
    truncated = [row for row in rows if row.is_cut]
    return SplitReport(
        rows_read=rows_read,
        rows=len(rows),
        dropped=rows_read - len(rows),
        truncated=len(truncated),
        answers_cut=sum(row.labels[-1] != IGNORED_LABEL for row in truncated),
        tokens=sum(lengths),
        trained_tokens=sum(label != IGNORED_LABEL for row in rows for label in row.labels),
        longest=lengths[-1] if lengths else 0,
        median=lengths[len(lengths) // 2] if lengths else 0,
        histogram=_make_histogram(lengths),
    )


def _make_histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return `(upper length, rows)` for bins that double in width."""
    bins: dict[int, int] = {}
    for length in lengths:
        upper = max(16, 1 << (length - 1).bit_length())
        bins[upper] = bins.get(upper, 0) + 1
    return sorted(bins.items())


def _note_losses(train: SplitReport, held_out: SplitReport | None, settings: DataSettings) -> tuple[str, ...]:
    splits = [split for split in (train, held_out) if split is not None]
    dropped, truncated = sum(s.dropped for s in splits), sum(s.truncated for s in splits)
    notes = []
    if dropped:
        notes.append(
            f"{dropped:,} rows exceed data.max_tokens: {settings.max_tokens} and are left out (data.overflow: {settings.overflow})"
        )
    if truncated:
        cut = sum(s.answers_cut for s in splits)
        notes.append(
            f"{truncated:,} rows are cut at {settings.max_tokens} tokens; {cut:,} answers lose their end and their stop token"
        )
    return tuple(notes)


def _fingerprint(*splits: Sequence[_TokenRow]) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(b"split")
        for row in rows:
            digest.update(repr((row.input_ids, row.labels)).encode())
    return digest.hexdigest()[:16]


def _make_dataset(rows: Sequence[_TokenRow]) -> Dataset:
    return Dataset.from_dict(
        {name: [vars(row)[name] for row in rows] for name in ("input_ids", "labels", "origin", "is_cut")}
    )
