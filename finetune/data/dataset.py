"""Files to rows to tokens: the splits that a run trains and evaluates on, with an account of every row."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.files import list_files, read_file
from finetune.data.gates import check_padding, check_rows
from finetune.data.rows import Row, choose_format, read_row
from finetune.data.template import ChatTemplate, list_stop_tokens
from finetune.data.tokens import (
    RowEncoder,
    SourceRow,
    TokenRow,
    TrainOn,
    cut_row,
    make_record_batch,
    split_text_row,
)
from finetune.errors import DataError
from finetune.folders import write_folder

_MOST_FAULTS = 1000
# Raised whenever the same files and settings would give other tokens than before.
_CACHE_VERSION = 1


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
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    train_on: TrainOn = "assistant"
    substitute: Mapping[str, str] = field(default_factory=dict)
    deduplicate: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class SplitReport:
    """The account of one split: `rows_read` + `parts` = `rows` + `dropped`; lengths are in tokens."""

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
    left_out: Mapping[str, int] = field(default_factory=dict)

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


def load_splits(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, seed: int
) -> Splits:
    """Read, split, render and tokenize the rows of a recipe, or find them in the cache.

    Raises:
        DataError: files or rows that cannot be used, with their lines; rows that are too long, where no policy says what to do.
    """
    check_padding(tokenizer, list_stop_tokens(tokenizer, template))
    if settings.cache is None:
        prepared = _prepare(settings, tokenizer, template, seed, None)
        return Splits(prepared.select("train"), prepared.select("evaluation"), prepared.report)
    folder = settings.cache / _make_key(settings, tokenizer, template, seed)
    if not folder.is_dir():
        with write_folder(folder) as partial:
            prepared = _prepare(settings, tokenizer, template, seed, partial / "rows.arrow")
            for name, chosen in prepared.chosen.items():
                numpy.save(partial / f"{name}.npy", chosen)
            (partial / "report.json").write_text(json.dumps(prepared.report.to_json()), encoding="utf-8")
    return _open_cached(folder)


@dataclass(frozen=True)
class _Prepared:
    rows: Dataset
    chosen: dict[str, Any]
    report: DataReport

    def select(self, name: str) -> Dataset | None:
        chosen = self.chosen[name]
        if len(chosen) == len(self.rows):
            return self.rows
        return self.rows.select(chosen) if len(chosen) else None


def _open_cached(folder: Path) -> Splits:
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for name in ("train", "evaluation"):
        if content[name] is not None:
            histogram = [tuple(bar) for bar in content[name]["histogram"]]
            content[name] = SplitReport(**{**content[name], "histogram": histogram})
    report = DataReport(**{**content, "notes": tuple(content["notes"])})
    chosen = {name: numpy.load(folder / f"{name}.npy") for name in ("train", "evaluation")}
    prepared = _Prepared(Dataset.from_file(str(folder / "rows.arrow")), chosen, report)
    return Splits(prepared.select("train"), prepared.select("evaluation"), report)


def _make_key(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, seed: int) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {seed} {template.spans} {template.name}".encode())
    values = {entry.name: getattr(settings, entry.name) for entry in fields(settings) if entry.name != "cache"}
    digest.update(repr(sorted(values.items(), key=lambda pair: pair[0])).encode())
    digest.update(template.source.encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items(), key=str)).encode())
    for path in (*settings.train, *settings.evaluation):
        for file in list_files(path):
            digest.update(str(file).encode())
            if file.is_file():
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:32]


def _prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    seed: int,
    file: Path | None,
) -> _Prepared:
    reader = _RowReader(settings)
    encoder = RowEncoder(tokenizer, template, settings.train_on)
    account = _Account(settings, encoder)
    batches = []
    writer = None
    for encoded in encoder.encode(reader.read()):
        kept = account.keep(encoded)
        if not kept:
            continue
        batch = make_record_batch(kept)
        if file is None:
            batches.append(batch)
            continue
        if writer is None:
            writer = pyarrow.ipc.new_stream(str(file), batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
    account.check()
    held = _choose_held_out(settings, reader, seed)
    chosen, reports = account.split(held, reader)
    if not account.lengths or not len(chosen["train"]):
        raise DataError(
            f"no row is left for training: all {reader.count - len(held):,} exceed data.max_tokens: {settings.max_tokens}"
        )
    if held and not len(chosen["evaluation"]):
        raise DataError(f"no held-out row is left: all {len(held):,} exceed data.max_tokens: {settings.max_tokens}")
    for name in chosen:
        account.digest.update(name.encode() + chosen[name].tobytes())
    report = DataReport(
        train=reports["train"],
        evaluation=reports["evaluation"] if held else None,
        formats=reader.formats,
        template=template.name,
        template_fingerprint=template.fingerprint,
        fingerprint=account.digest.hexdigest()[:16],
        notes=(*_note_losses(reports["train"], reports["evaluation"], settings), *reader.describe_left_out()),
        left_out=dict(reader.left_out),
    )
    rows = Dataset.from_file(str(file)) if file else Dataset(pyarrow.Table.from_batches(batches))
    return _Prepared(rows, chosen, report)


class _RowReader:
    """Read files as a stream of rows, counting all that is left out."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._seen: set[bytes] = set()
        self.formats: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()
        self.count = self.train_count = 0

    def read(self) -> Iterator[SourceRow]:
        yield from self._read_paths(self._settings.train)
        self.train_count = self.count
        yield from self._read_paths(self._settings.evaluation)

    def _read_paths(self, paths: Sequence[Path]) -> Iterator[SourceRow]:
        faults: list[tuple[str, str]] = []
        for path in (file for entry in paths for file in list_files(entry)):
            entry = None
            for where, raw in read_file(path):
                if entry is None:
                    entry = choose_format(self._settings.format, self._settings.columns, raw, where)
                    self.formats[str(path)] = entry.name
                    if entry.row_kind == "prompt":
                        raise DataError(f"{where}: holds a prompt alone; training needs an answer to each")
                try:
                    row = read_row(entry, self._settings.columns, self._substitute(raw), where)
                except DataError as error:
                    origin, _, fault = str(error).partition(": ")
                    faults.append((origin, fault))
                    if len(faults) >= _MOST_FAULTS:
                        break
                    continue
                if not self._is_left_out(row):
                    self.count += 1
                    yield SourceRow(self.count - 1, where, entry.row_kind, self._add_system(row))
        check_rows(faults)

    def _is_left_out(self, row: Row) -> bool:
        if row.label is False:
            self.left_out["labelled false"] += 1
            return True
        if not self._settings.deduplicate:
            return False
        digest = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
        if digest in self._seen:
            self.left_out["duplicates"] += 1
            return True
        self._seen.add(digest)
        return False

    def _add_system(self, row: Row) -> Row:
        system = self._settings.system
        if system is None or row.text or (row.messages and row.messages[0]["role"] == "system"):
            return row
        messages = [{"role": "system", "content": system}, *row.messages]
        return Row(messages, row.chosen, row.rejected, row.label, row.text, row.tools)

    def _substitute(self, raw: dict[str, Any]) -> dict[str, Any]:
        values = self._settings.substitute
        if not values:
            return raw
        pattern = re.compile(r"\{\{\s*(" + "|".join(map(re.escape, values)) + r")\s*\}\}")

        def replace(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: values[match.group(1)], value)
            if isinstance(value, dict):
                return {key: replace(inner) for key, inner in value.items()}
            return [replace(inner) for inner in value] if isinstance(value, list) else value

        return {key: replace(value) for key, value in raw.items()}

    def describe_left_out(self) -> tuple[str, ...]:
        return tuple(f"{count:,} rows are left out: {reason}" for reason, count in sorted(self.left_out.items()))


class _Account:
    """Apply the policy for long rows and remember a few numbers of each row, not the rows."""

    def __init__(self, settings: DataSettings, encoder: RowEncoder) -> None:
        self._settings = settings
        self._encoder = encoder
        self._faults: list[tuple[str, str]] = []
        self._read = self._long = 0
        self._worst: tuple[int, str] = (0, "")
        self.digest = hashlib.sha256()
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        self.trained: list[int] = []
        self.cut: list[int] = []

    def keep(self, encoded: Sequence[TokenRow]) -> list[TokenRow]:
        limit, overflow = self._settings.max_tokens, self._settings.overflow
        kept: list[TokenRow] = []
        for row in encoded:
            self._read += 1
            if row.full_length <= limit:
                kept.append(row)
                continue
            self._long += 1
            self._worst = max(self._worst, (row.full_length, row.source.origin))
            if overflow == "split" and row.source.kind == "text":
                kept += split_text_row(row, limit)
            elif overflow == "truncate" and (cut := cut_row(row, limit)).spans:
                # A row whose answer starts beyond the limit would train nothing.
                kept.append(cut)
        for row in kept:
            self._note(row)
        return kept

    def _note(self, row: TokenRow) -> None:
        if fault := self._encoder.find_fault(row):
            self._faults.append((row.source.origin, fault))
        self.digest.update(numpy.array(row.token_ids, numpy.int32).tobytes() + repr(row.spans).encode())
        self.numbers.append(row.source.number)
        self.lengths.append(len(row.token_ids))
        self.trained.append(sum(end - start for start, end in row.spans))
        self.cut.append(0 if not row.is_cut else 2 if row.spans[-1][1] == len(row.token_ids) else 1)

    def check(self) -> None:
        check_rows(self._faults)
        if self._long and self._settings.overflow == "error":
            raise DataError(
                f"{self._long:,} of {self._read:,} rows are longer than data.max_tokens: {self._settings.max_tokens} (the "
                f"longest has {self._worst[0]:,} tokens: {self._worst[1]}); raise data.max_tokens, or say what to do with "
                "them: data.overflow: drop or truncate"
            )

    def split(self, held: set[int], reader: _RowReader) -> tuple[dict[str, Any], dict[str, SplitReport]]:
        is_held = numpy.fromiter((number in held for number in self.numbers), dtype=bool, count=len(self.numbers))
        chosen = {"train": numpy.flatnonzero(~is_held), "evaluation": numpy.flatnonzero(is_held)}
        read = {"train": reader.count - len(held), "evaluation": len(held)}
        return chosen, {name: self._report(chosen[name], read[name]) for name in chosen}

    def _report(self, chosen: Any, rows_read: int) -> SplitReport:
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
            tokens=sum(ordered),
            trained_tokens=int(numpy.array(self.trained, int)[chosen].sum()),
            longest=ordered[-1] if ordered else 0,
            median=ordered[len(ordered) // 2] if ordered else 0,
            histogram=_make_histogram(ordered),
            parts=len(ordered) - kept,
        )


def _choose_held_out(settings: DataSettings, reader: _RowReader, seed: int) -> set[int]:
    total, held_out = reader.train_count, settings.held_out
    given = set(range(reader.train_count, reader.count))
    if not held_out:
        return given
    count = held_out if isinstance(held_out, int) else max(1, round(total * held_out))
    if count >= total:
        raise DataError(f"data.held_out: {count} of {total} rows would leave none for training; hold out fewer")
    return given | set(random.Random(seed).sample(range(total), count))


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
