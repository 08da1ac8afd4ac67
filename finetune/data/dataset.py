"""Prepare the splits that a run trains and evaluates on: read files, encode rows, cut long rows, count everything."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.account import Account, DataReport, SplitReport, describe_bad_rows, describe_long_rows
from finetune.data.encoding.columns import ColumnHash, make_record_batch
from finetune.data.encoding.gates import check_padding
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.row_encoder import RowEncoder, TokenRow
from finetune.data.encoding.template import list_rendered_thoughts, list_stop_tokens
from finetune.data.encoding.text_samples import SampleCollector
from finetune.data.encoding.workers import encode_rows
from finetune.data.formats.rows import TextSample
from finetune.data.reading.row_reader import BAD, RowReader, choose_held_out
from finetune.data.reading.sources import describe_sources, hash_source
from finetune.data.settings import DataSettings
from finetune.errors import DataError
from finetune.files.cache import make_once
from finetune.files.folders import write_folder
from finetune.files.speed import collect_between, pause_garbage_search

# Raise it whenever the same files and settings would give other columns than before.
_CACHE_VERSION = 10
# These settings do not change the rows.
_NOT_IN_KEY = ("cache", "workers")


@dataclass(frozen=True)
class Splits:
    """The rows for training and evaluation as tokens; `evaluation` is None where no rows are held out.

    All rows have the columns `input_ids`, `labels` (-100 where a token is not trained), `is_cut`, `place` (the fields of `Place`)
    and `origin` (the same place as text). Pairs add `prompt_ids`, `chosen_ids` and `rejected_ids`. Labelled answers add
    `prompt_ids`, `completion_ids` and `label`. Prompts add `prompt` (messages) and `answer` (the reference answer, or None).
    `samples` are a few of the rows with their texts.
    """

    train: Dataset
    evaluation: Dataset | None
    report: DataReport
    samples: tuple[TextSample, ...] = ()


def load_splits(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, seed: int
) -> Splits:
    """Return the rows of a recipe as tokens, from the cache where the same files and settings were prepared before.

    Raises:
        DataError: files or rows cannot be used, or rows are too long and `overflow` is `error`.
        TemplateError: the template refuses a conversation.
    """
    check_padding(tokenizer, list_stop_tokens(tokenizer, template))
    if settings.cache is None:
        return _add_notes(_prepare(settings, tokenizer, template, seed, None).as_splits(), settings)

    def make(folder: Path) -> None:
        with write_folder(folder) as partial:
            prepared = _prepare(settings, tokenizer, template, seed, partial / "rows.arrow")
            for name, chosen in prepared.chosen.items():
                numpy.save(partial / f"{name}.npy", chosen)
            (partial / "report.json").write_text(json.dumps(prepared.report.to_json()), encoding="utf-8")
            (partial / "samples.json").write_text(json.dumps(list(map(asdict, prepared.samples))), encoding="utf-8")

    folder = make_once(settings.cache / _make_key(settings, tokenizer, template, seed), make)
    return _add_notes(_open_cached(folder), settings)


def _add_notes(splits: Splits, settings: DataSettings) -> Splits:
    """Add what is said about the files now: the files that are not read may change while the rows, which are kept, do not."""
    notes = (*describe_sources((*settings.train, *settings.evaluation)), *splits.report.notes)
    return replace(splits, report=replace(splits.report, notes=notes))


@dataclass(frozen=True)
class _Prepared:
    """All kept rows; `chosen` maps each split to the indices of its rows, an int64 array."""

    rows: Dataset
    chosen: dict[str, Any]
    report: DataReport
    samples: tuple[TextSample, ...]

    def as_splits(self) -> Splits:
        """Return the rows by split."""
        return Splits(self.select("train"), self.select("evaluation"), self.report, self.samples)

    def select(self, name: str) -> Dataset | None:
        """Return the rows of a split, or None where it has none."""
        chosen = self.chosen[name]
        if len(chosen) == len(self.rows):
            return self.rows
        return self.rows.select(chosen) if len(chosen) else None


def _open_cached(folder: Path) -> Splits:
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for name in ("train", "evaluation"):
        if content[name] is not None:
            found = content[name]
            histogram = [tuple(bar) for bar in found["histogram"]]
            sources = {source: tuple(counts) for source, counts in found["sources"].items()}
            content[name] = SplitReport(**{**found, "histogram": histogram, "sources": sources})
    report = DataReport(**{**content, "notes": tuple(content["notes"])})
    chosen = {name: numpy.load(folder / f"{name}.npy") for name in ("train", "evaluation")}
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    return _Prepared(rows, chosen, report, tuple(TextSample(**sample) for sample in samples)).as_splits()


def _make_key(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, seed: int) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {seed} {template.spans} {template.name}".encode())
    values = {entry.name: getattr(settings, entry.name) for entry in fields(settings) if entry.name not in _NOT_IN_KEY}
    digest.update(repr(sorted(values.items(), key=lambda pair: pair[0])).encode())
    digest.update(template.source.encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items(), key=str)).encode())
    for source in (*settings.train, *settings.evaluation):
        digest.update(hash_source(source).encode())
    return digest.hexdigest()[:32]


def _prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    seed: int,
    file: Path | None,
) -> _Prepared:
    reader = RowReader(settings, seed, list_rendered_thoughts(tokenizer, template))
    encoder = RowEncoder(tokenizer, template, settings.train_on, settings.shape)
    account = Account(settings, encoder)
    content, samples = ColumnHash(), SampleCollector(settings)
    encoded = samples.watch(encode_rows(encoder, reader.read(), settings.workers))
    batches = (account.keep(batch) for batch in encoded)
    with pause_garbage_search():
        rows = _write_rows(batches, file, content)
    account.check()
    held = choose_held_out(settings, reader, seed)
    chosen, reports = account.split(held, reader.count)
    faults = [*reader.bad, *account.list_faults()]
    bad = reader.left_out[BAD] + sum(split.bad for split in reports.values())
    bad_rows = describe_bad_rows(bad, faults)
    _check_not_empty(reports, settings, (*bad_rows, *reader.describe_left_out()))
    assert rows is not None, "the training split has rows"
    long_rows = describe_long_rows(reports["train"], reports["evaluation"], settings)
    report = DataReport(
        train=reports["train"],
        evaluation=reports["evaluation"] if held else None,
        formats=reader.formats,
        template=template.name,
        template_fingerprint=template.fingerprint,
        fingerprint=content.finish(chosen),
        notes=(
            *settings.notes,
            *bad_rows,
            *long_rows,
            *reader.describe(),
            *encoder.describe(),
            *account.describe_labels(),
        ),
        left_out={reason: count for reason, count in reader.left_out.items() if count},
    )
    return _Prepared(rows, chosen, report, samples.choose(held))


def _check_not_empty(reports: Mapping[str, SplitReport], settings: DataSettings, left_out: Sequence[str]) -> None:
    """Check that rows are left for both splits, and that not every answer has lost its stop token; `left_out` says what was left out.

    Raises:
        DataError: a split would be empty or useless.
    """
    train, held_out = reports["train"], reports["evaluation"]
    names = {"row is left for training": train}
    if settings.evaluation or held_out.rows_read:
        names["held-out row is left"] = held_out
    for name, split in names.items():
        if not split.rows:
            long = split.rows_read - split.bad
            limit = [f"all {long:,} exceed data.max_tokens: {settings.max_tokens}"] if long else []
            raise DataError(f"no {name}: {'; '.join([*limit, *left_out]) or 'the files hold none'}")
    if train.rows == train.answers_cut:
        raise DataError(
            f"every answer loses its end and its stop token: all {train.rows:,} rows are cut at data.max_tokens: "
            f"{settings.max_tokens}, so the model would never learn to stop; raise data.max_tokens"
        )


def _write_rows(batches: Iterator[list[TokenRow]], file: Path | None, content: ColumnHash) -> Dataset | None:
    """Write each batch to an Arrow file, or keep it in memory where `file` is None; return None where there are no rows."""
    kept, writer = [], None
    for rows in collect_between(batches):
        if not rows:
            continue
        batch = make_record_batch(rows)
        content.update(batch)
        if file is None:
            kept.append(batch)
            continue
        writer = writer or pyarrow.ipc.new_stream(str(file), batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
        return Dataset.from_file(str(file))
    return Dataset(pyarrow.Table.from_batches(kept)) if kept else None
