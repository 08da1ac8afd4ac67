"""Read the rows of a recipe one after another, and count those that are left out."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.encoding.gates import check_rows
from finetune.data.encoding.row_encoder import SourceRow
from finetune.data.formats.messages import RowError
from finetune.data.formats.row_formats import Format, choose_format, describe_label, describe_wrong_kind, read_row
from finetune.data.formats.row_keys import Rendered, describe_remarks, describe_unused
from finetune.data.formats.rows import Row, as_prompt, check_marks, check_pair, has_only_untrained, hash_row
from finetune.data.formats.turns import add_system
from finetune.data.reading.sources import draw_rows, read_source
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, Place, describe_count

_MOST_FAULTS = 1000
BAD = "bad (data.bad_rows: drop)"


class RowReader:
    """Reads the sources of a recipe as a stream of rows. The seed chooses the rows of a mixture.

    `rendered` says which thoughts the chat template renders, as `list_unused_keys` takes it. `unused` counts the rows that hold
    a key that is not used, by the key, `remarks` those that are read in another way than they are written, by the remark.
    `bad` holds the place and the fault of the first rows that are left out for a fault.
    `formats` maps each file to the format of its rows, `kinds` counts rows by kind, `left_out` counts rows by the reason why
    they are left out. `count` is the number of rows that were read and kept, `train_count` those of them for training.
    """

    def __init__(self, settings: DataSettings, seed: int, rendered: Rendered) -> None:
        self._settings = settings
        self._seed = seed
        self._rendered = rendered
        self._seen: set[bytes] = set()
        names = "|".join(map(re.escape, settings.substitute))
        self._placeholder = re.compile(r"\{\{\s*(" + names + r")\s*\}\}")
        self.formats: dict[str, str] = {}
        self.kinds: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.bad: list[tuple[Place, str]] = []
        self._missing = set(settings.columns.values())
        self.count = self.train_count = 0

    def read(self) -> Iterator[SourceRow]:
        """Yield the rows for training, then the rows for evaluation.

        Raises:
            DataError: files or rows cannot be used; the message names their lines.
        """
        yield from self._read_sources(self._settings.train)
        self.train_count = self.count
        yield from self._read_sources(self._settings.evaluation)

    def _read_sources(self, sources: Sequence[Source]) -> Iterator[SourceRow]:
        faults: list[tuple[Place, str]] = []
        for entry, place, raw in self._read_raw(sources):
            try:
                if entry is None or isinstance(raw, DataError):
                    raise raw if isinstance(raw, DataError) else DataError("fits no format", place)
                row = self._read_row(entry, raw, place)
            except DataError as error:
                if self._settings.bad_rows == "drop":
                    self.left_out[BAD] += 1
                    if len(self.bad) < _MOST_FAULTS:
                        self.bad.append((place, error.fault))
                    continue
                faults.append((place, error.fault))
                if len(faults) >= _MOST_FAULTS:
                    break
                continue
            if not self._is_left_out(row):
                self.count += 1
                self.kinds[entry.row_kind] += 1
                kind = "prompt" if self._settings.shape == "prompt" else entry.row_kind
                yield SourceRow(self.count - 1, place, kind, self._add_system(row))
        check_rows(faults)

    def _read_row(self, entry: Format, raw: dict[str, Any], place: Place) -> Row:
        if self._missing:
            self._missing.difference_update(raw)
        row = read_row(
            entry,
            self._settings.columns,
            self._substitute(raw),
            place,
            self._rendered,
            merge_turns=self._settings.merge_turns,
        )
        self.unused.update(row.unused)
        self.remarks.update(row.remarks)
        if self._settings.shape != "prompt":
            self._check_shape(entry, row, place)
            return row
        row = as_prompt(row, place)
        if self._settings.needs_answer and row.answer is None:
            raise DataError(
                f"has no answer, which {self._settings.needs_answer} compares with; "
                "name its key, such as data.columns: {answer: ANSWER_KEY}",
                place,
            )
        return row

    def _read_raw(self, sources: Sequence[Source]) -> Iterator[tuple[Format | None, Place, dict[str, Any] | DataError]]:
        """Yield the rows that are drawn from each source, with their format (None where no row before fits one) and place."""
        for source, draw in zip(sources, draw_rows(sources, self._seed), strict=True):
            number = 0
            for name, rows in read_source(source):
                entry: Format | None = None
                for place, raw in rows:
                    if entry is None and not isinstance(raw, DataError):
                        found = self._choose_format(name, raw, place)
                        entry, raw = (None, found) if isinstance(found, DataError) else (found, raw)
                    if draw.taken is None or number in draw.taken:
                        yield entry, place, raw
                    number += 1
            if draw.taken is not None and number > len(draw.taken):
                self.left_out[draw.note] += number - len(draw.taken)

    def _choose_format(self, name: str, raw: dict[str, Any], place: Place) -> Format | DataError:
        """Return the format of a file by its first row; or the error, where that row may be left out.

        Raises:
            DataError: the row fits no format, or one that the method cannot use.
        """
        try:
            entry = choose_format(self._settings.format, self._settings.columns, raw, place)
        except DataError as error:
            if self._settings.bad_rows == "drop":
                return error
            raise
        self.formats[name] = entry.name
        if fault := describe_wrong_kind(entry, self._settings.shape):
            raise DataError(fault + describe_label(raw, self._settings.shape), place)
        return entry

    def _check_shape(self, entry: Format, row: Row, place: Place) -> None:
        """Check that a row can be trained in the shape that the method needs."""
        try:
            check_marks(row, self._settings.shape, self._settings.train_on)
            if entry.row_kind == "preference" and self._settings.shape != "sequence":
                check_pair(row)
        except RowError as error:
            raise DataError(str(error), place, error.kind) from error

    def _is_left_out(self, row: Row) -> bool:
        if row.label is False and self._settings.shape == "sequence":
            self.left_out["labelled false"] += 1
            return True
        if not row.is_trained or (
            self._settings.shape == "sequence" and has_only_untrained(row, self._settings.train_on)
        ):
            self.left_out["marked as not trained"] += 1
            return True
        if not self._settings.deduplicate:
            return False
        digest = hash_row(row)
        if digest in self._seen:
            self.left_out["duplicates"] += 1
            return True
        self._seen.add(digest)
        return False

    def _add_system(self, row: Row) -> Row:
        if self._settings.system is None or row.text or row.token_ids:
            return row
        return replace(row, messages=add_system(row.messages, self._settings.system))

    def _substitute(self, raw: dict[str, Any]) -> dict[str, Any]:
        values = self._settings.substitute
        if not values:
            return raw

        def fill(value: Any) -> Any:
            if isinstance(value, str):
                return self._placeholder.sub(lambda match: values[match.group(1)], value)
            if isinstance(value, dict):
                return {key: fill(inner) for key, inner in value.items()}
            return [fill(inner) for inner in value] if isinstance(value, list) else value

        return {key: fill(value) for key, value in raw.items()}

    def describe(self) -> tuple[str, ...]:
        """Return sentences for the report: which keys are not used, how many rows are left out, and what pairs lose."""
        notes = [*describe_unused(self.unused), *describe_remarks(self.remarks)]
        notes += [f"data.columns names the key {key!r}, which no row has" for key in sorted(self._missing)]
        notes += self.describe_left_out()
        pairs = self.kinds["preference"]
        if pairs and self._settings.shape == "sequence":
            notes.append(
                f"{describe_count(pairs, 'row is a pair', 'rows are pairs')}; supervised training learns the chosen answers"
            )
        return tuple(notes)

    def describe_left_out(self) -> list[str]:
        """Return a sentence for each reason other than a fault for which rows are left out."""
        left_out = sorted((reason, count) for reason, count in self.left_out.items() if reason != BAD and count)
        return [f"{describe_count(count, 'row is', 'rows are')} left out: {reason}" for reason, count in left_out]


def choose_held_out(settings: DataSettings, reader: RowReader, seed: int) -> set[int]:
    """Return the numbers of the rows for evaluation: those of the evaluation files, and those drawn by the seed.

    Raises:
        DataError: no row would be left for training.
    """
    total, held_out = reader.train_count, settings.held_out
    given = set(range(reader.train_count, reader.count))
    if not held_out:
        return given
    count = held_out if isinstance(held_out, int) else max(1, round(total * held_out))
    if count >= total:
        raise DataError(
            f"data.held_out: {count} of {describe_count(total, 'row')} would leave none for training; hold out fewer"
        )
    return given | set(random.Random(seed).sample(range(total), count))
