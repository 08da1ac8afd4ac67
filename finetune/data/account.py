"""Count all rows: how many were read, kept, dropped and cut, and how long they are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy

from finetune.data.encoding.gates import check_rows
from finetune.data.encoding.row_encoder import RowEncoder, SourceRow, TokenRow, cut_row, split_text_row
from finetune.data.settings import DataSettings
from finetune.errors import DataError, Place, describe_count

_MOST_BAD_SHOWN = 3


@dataclass(frozen=True)
class SplitReport:
    """The numbers of one split: `rows_read` + `parts` = `rows` + `dropped`. `bad` counts the dropped rows that have a fault.

    `parts` is how many rows were added by splitting long texts. `answers_cut` counts the `truncated` rows whose answer lost its
    end. `longest`, `median` and `histogram` count tokens, for a pair those of its longer side. `histogram` holds
    `(upper length, rows)`, and `sources` maps each file or data set to its `(rows, tokens)`.
    """

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
    parts: int = 0
    bad: int = 0
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class DataReport:
    """The numbers of all rows.

    `formats` maps each file to the format of its rows. `left_out` counts the rows that were not read into a split, by reason.
    `notes` are sentences for a person. `fingerprint` is a hash of the tokens, `template_fingerprint` one of the template.
    """

    train: SplitReport
    evaluation: SplitReport | None
    formats: dict[str, str]
    template: str
    template_fingerprint: str
    fingerprint: str
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """Return the numbers of all rows as one line."""
        tokens = f"{self.train.trained_tokens:,} of {describe_count(self.train.tokens, 'token')} trained"
        if not self.train.trained_tokens:
            tokens = f"prompts of {describe_count(self.train.tokens, 'token')}"
        parts = [f"{self.train.rows:,} for training ({tokens})"]
        if self.evaluation is not None:
            parts.append(f"{self.evaluation.rows:,} held out")
        for name in ("dropped", "truncated", "answers_cut"):
            count = sum(vars(split)[name] for split in (self.train, self.evaluation) if split is not None)
            if count:
                parts.append(f"{count:,} {name.replace('_', ' ')}")
        return f"{', '.join(parts)}; template {self.template}"


class Account:
    """Applies `data.overflow` to long rows, and keeps a few numbers of each row instead of the row.

    The lists hold one entry for each kept row: `numbers` its number among the rows read, `lengths` the tokens of its longer side,
    `tokens` the tokens of both sides, `trained` its trained tokens, and `cut` 0 for a whole row, 1 for one that is cut, 2 for one
    whose answer lost its end. `liked` holds the labels of labelled rows only.
    """

    def __init__(self, settings: DataSettings, encoder: RowEncoder) -> None:
        self._settings = settings
        self._encoder = encoder
        self._faults: list[tuple[SourceRow, str]] = []
        self._read = self._long = 0
        self._worst: tuple[int, str] = (0, "")
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.cut: list[int] = []
        self.liked: list[bool] = []
        self._sources: dict[str, int] = {}
        self._source_numbers: list[int] = []

    def keep(self, encoded: Sequence[TokenRow]) -> list[TokenRow]:
        """Return the rows of a batch that are kept, cut or split as `data.overflow` says."""
        limit, overflow = self._settings.max_tokens, self._settings.overflow
        kept: list[TokenRow] = []
        for row in encoded:
            self._read += 1
            if row.full_length <= limit:
                kept.append(row)
                continue
            self._long += 1
            self._worst = max(self._worst, (row.full_length, str(row.source.place)))
            if overflow == "split" and row.source.kind == "text":
                kept += split_text_row(row, limit)
            elif overflow == "truncate" and row.spans and (cut := cut_row(row, limit)).spans:
                # A row whose answer begins after the limit has no spans left, and would train nothing.
                kept.append(cut)
        sound = []
        for row in kept:
            if fault := self._encoder.find_fault(row):
                self._faults.append((row.source, fault))
            else:
                sound.append(row)
                self._note(row)
        return sound

    def _note(self, row: TokenRow) -> None:
        self.numbers.append(row.source.number)
        self.lengths.append(max(map(len, row.sides)))
        self.tokens.append(sum(map(len, row.sides)))
        self.trained.append(row.trained_tokens)
        self._source_numbers.append(self._sources.setdefault(row.source.place.file, len(self._sources)))
        if row.label is not None:
            self.liked.append(row.label)
        loses_end = row.rejected is not None or (bool(row.spans) and row.spans[-1][1] == len(row.token_ids))
        self.cut.append(0 if not row.is_cut else 2 if loses_end else 1)

    def check(self) -> None:
        """Check all rows that were kept.

        Raises:
            DataError: rows are faulty, rows are too long and `overflow` is `error`, or all labels are the same.
        """
        if self._settings.bad_rows == "error":
            check_rows(self.list_faults())
        if self._long and self._settings.overflow == "error":
            rows = describe_count(self._read, "row")
            raise DataError(
                f"{describe_count(self._long, f'of {rows} is', f'of {rows} are')} longer than data.max_tokens: {self._settings.max_tokens} (the "
                f"longest has {describe_count(self._worst[0], 'token')}: {self._worst[1]}); raise data.max_tokens, or say what to do with "
                "them: data.overflow: drop or truncate"
            )

        if self.liked and len(set(self.liked)) == 1:
            word, other = ("true", "false") if self.liked[0] else ("false", "true")
            raise DataError(
                f"all {describe_count(len(self.liked), 'answer is', 'answers are')} labelled {word}; this method learns from answers that are liked and from "
                f"others that are not, so add rows with label: {other}"
            )

    def list_faults(self) -> list[tuple[Place, str]]:
        """Return the rows that cannot be trained, or that the template refuses, by their places, each with its fault."""
        return [(source.place, fault) for source, fault in (*self._faults, *self._encoder.refused)]

    def describe_labels(self) -> tuple[str, ...]:
        """Return a sentence about the weights to set where liked and disliked answers are not balanced.

        Source: KTO (arXiv 2402.01306), equation 8: the ratio of the weighted sides should lie between 1:1 and 4:3.
        """
        liked, others = sum(self.liked), len(self.liked) - sum(self.liked)
        if not self.liked or 1 <= liked / others <= 4 / 3:
            return ()
        return (
            f"{describe_count(liked, 'answer is', 'answers are')} liked and {describe_count(others, 'is', 'are')} not; trainer.undesirable_weight: {liked / others:.3g} gives both "
            "sides the same weight",
        )

    def split(self, held: set[int], read: int) -> tuple[dict[str, Any], dict[str, SplitReport]]:
        """Return the indices of each split's rows among the kept rows (int64 arrays), and the reports of the splits.

        `held` holds the numbers of the rows for evaluation. `read` is the number of all rows that were read.
        """
        is_held = numpy.fromiter((number in held for number in self.numbers), dtype=bool, count=len(self.numbers))
        chosen = {"train": numpy.flatnonzero(~is_held), "evaluation": numpy.flatnonzero(is_held)}
        counts = {"train": read - len(held), "evaluation": len(held)}
        bad = {source.number for source, _ in (*self._faults, *self._encoder.refused)} - set(self.numbers)
        bad_counts = {"train": len(bad - held), "evaluation": len(bad & held)}
        return chosen, {name: self._report(chosen[name], counts[name], bad_counts[name]) for name in chosen}

    def _report(self, chosen: Any, rows_read: int, bad: int) -> SplitReport:
        lengths, cut = numpy.array(self.lengths, int)[chosen], numpy.array(self.cut, int)[chosen]
        ordered = sorted(lengths.tolist())
        kept = len(set(numpy.array(self.numbers, int)[chosen].tolist()))
        is_split = self._settings.overflow == "split"
        return SplitReport(
            rows_read=rows_read,
            rows=len(ordered),
            dropped=rows_read - kept,
            truncated=0 if is_split else int((cut > 0).sum()),
            answers_cut=0 if is_split else int((cut == 2).sum()),
            tokens=int(numpy.array(self.tokens, int)[chosen].sum()),
            trained_tokens=int(numpy.array(self.trained, int)[chosen].sum()),
            longest=ordered[-1] if ordered else 0,
            median=ordered[len(ordered) // 2] if ordered else 0,
            histogram=_make_histogram(ordered),
            parts=len(ordered) - kept,
            bad=bad,
            sources=self._count_sources(chosen),
        )

    def _count_sources(self, chosen: Any) -> dict[str, tuple[int, int]]:
        numbers, most = numpy.array(self._source_numbers, int)[chosen], len(self._sources)
        rows = numpy.bincount(numbers, minlength=most).tolist()
        tokens = numpy.bincount(numbers, numpy.array(self.tokens, float)[chosen], minlength=most).astype(int).tolist()
        return {name: (rows[number], tokens[number]) for name, number in self._sources.items() if rows[number]}


def _make_histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return `(upper length, rows)` for each bin; the upper lengths are powers of two from 16 tokens on."""
    bins: dict[int, int] = {}
    for length in lengths:
        upper = max(16, 1 << (length - 1).bit_length())
        bins[upper] = bins.get(upper, 0) + 1
    return sorted(bins.items())


def describe_long_rows(train: SplitReport, held_out: SplitReport | None, settings: DataSettings) -> tuple[str, ...]:
    """Return sentences about the rows that were left out or cut because they are too long."""
    splits = [split for split in (train, held_out) if split is not None]
    dropped, truncated = sum(s.dropped - s.bad for s in splits), sum(s.truncated for s in splits)
    notes = []
    if dropped:
        notes.append(
            f"{describe_count(dropped, 'row is', 'rows are')} longer than data.max_tokens: {settings.max_tokens} and left out (data.overflow: {settings.overflow})"
        )
    if truncated:
        cut = sum(s.answers_cut for s in splits)
        notes.append(
            f"{describe_count(truncated, 'row is', 'rows are')} cut at {describe_count(settings.max_tokens, 'token')}; {describe_count(cut, 'answer loses its end and its stop token', 'answers lose their end and their stop token')}"
        )
    return tuple(notes)


def describe_bad_rows(count: int, faults: Sequence[tuple[Place, str]]) -> tuple[str, ...]:
    """Return a sentence about the rows that are left out for a fault; it names the first few."""
    if not count:
        return ()
    shown = "; ".join(f"{place}: {fault}" for place, fault in faults[:_MOST_BAD_SHOWN])
    more = f"; and {count - _MOST_BAD_SHOWN:,} more" if count > _MOST_BAD_SHOWN else ""
    return (f"{describe_count(count, 'bad row is', 'bad rows are')} left out (data.bad_rows: drop): {shown}{more}",)
