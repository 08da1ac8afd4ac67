"""Measure single training rows before step 1 and after the last step, so that bad rows show.

All rows are measured with the same weights, so that their losses can be compared. The losses of the training steps cannot: the first
rows are trained on with weights that have learnt nothing yet. No random number is drawn.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from finetune.data.preview.preview import list_sides, mark_sides
from finetune.data.settings import RowShape
from finetune.files.json_files import explain_damage, read_json, write_json
from finetune.models.row_loss import MarkedTokens, measure_losses
from finetune.runs.run_files import MEASURED_ROWS_FILE
from finetune.training.training_rows import count_step_rows

logger = logging.getLogger(__name__)

_RANKED_ROWS, _PREVIEWED_ROWS = 20, 3
# What the page shows of a row, so that a report stays far below 2 MB: letters of a piece that is trained or not, and pieces.
_TRAINED_LETTERS, _OTHER_LETTERS, _MOST_PIECES = 900, 500, 6

# What a row's value is made of: the losses of its sides, each with its number of trained tokens, and the row itself.
Losses = Sequence[tuple[float, int]]


# Two forward passes cost about two thirds of a step on the same row, so one row for 32 costs about 2 % of the training.
_LEAST_ROWS, _MOST_ROWS, _TRAINED_PER_ROW = 4, 256, 32


def count_measured(asked: int | None, trainer: Trainer) -> int:
    """Return how many rows to measure: what was asked for, or what a run of this length can pay for."""
    if asked is not None:
        return asked
    config = trainer.args
    steps, epochs = config.max_steps, config.num_train_epochs
    trained = steps * count_step_rows(config) if steps > 0 else int(len(trainer.train_dataset) * epochs)
    return min(_MOST_ROWS, max(_LEAST_ROWS, trained // _TRAINED_PER_ROW))


@dataclass(frozen=True)
class Ranking:
    """The rows with the highest `key` of their values before and after the training, under a title."""

    title: str
    key: Callable[[float, float], float]


@dataclass(frozen=True)
class RowMeasure:
    """The value that a row of one shape gets, what it means, and the rankings by it.

    `is_mean`: it is a mean over trained tokens, so that means over rows weigh it by their number.
    """

    label: str
    find_value: Callable[[Losses, Mapping[str, Any]], float]
    rankings: tuple[Ranking, ...]
    is_mean: bool = False


def _find_loss(losses: Losses, row: Mapping[str, Any]) -> float:
    return losses[0][0]


def _find_margin(losses: Losses, row: Mapping[str, Any]) -> float:
    chosen, rejected = (-loss * tokens for loss, tokens in losses)
    return chosen - rejected


def _find_likelihood(losses: Losses, row: Mapping[str, Any]) -> float:
    likelihood = -losses[0][0] * losses[0][1]
    return likelihood if row["label"] else -likelihood


# Each shape whose rows hold what the model should answer.
MEASURES: Mapping[RowShape, RowMeasure] = {
    "sequence": RowMeasure(
        "loss, nats a trained token",
        _find_loss,
        (
            Ranking("Rows of the highest loss after the training", lambda before, after: after),
            Ranking("Rows whose loss fell most", lambda before, after: before - after),
        ),
        is_mean=True,
    ),
    "pair": RowMeasure(
        "log-likelihood of the chosen answer minus that of the rejected one, nats",
        _find_margin,
        (Ranking("Pairs that were learnt least, or against", lambda before, after: before - after),),
    ),
    "labelled": RowMeasure(
        "log-likelihood of the answer, nats, with the sign turned where it is not liked",
        _find_likelihood,
        (Ranking("Answers that were learnt least, or against", lambda before, after: before - after),),
    ),
}


@dataclass(frozen=True)
class MeasuredRow:
    """A row's place, its trained tokens, and its value before and after the training; a value may be unknown."""

    origin: str
    source: str
    trained: int
    before: float | None
    after: float | None = None


class RowSheet:
    """Writes the values of rows to `row_losses.json`, before and after the training.

    The rows are spread evenly over all training rows. `computes` gives the context in which the trainer computes losses.
    """

    def __init__(
        self, run: Path, rows: Dataset, tokenizer: PreTrainedTokenizerBase, shape: RowShape, limits: "SheetLimits"
    ) -> None:
        self._file = run / MEASURED_ROWS_FILE
        self._measure = MEASURES[shape]
        self._limits = limits
        self._tokenizer = tokenizer
        places = numpy.linspace(0, len(rows) - 1, min(limits.rows, len(rows))).round().astype(int)
        self._first = rows.select(range(min(_PREVIEWED_ROWS, len(rows))))
        self._rows = rows.select(places)

    def write_before(self, model: PreTrainedModel | PeftModel) -> None:
        """Measure the rows before step 1, and write their values."""
        found = zip(self._list_places(), self._measure_rows(model), strict=True)
        self._write([MeasuredRow(*place, before=value) for place, value in found])

    def check_before(self) -> None:
        """Check what a run that goes on wrote before its step 1, and say where it is missing.

        Raises:
            FinetuneError: the file is damaged.
        """
        if not self._file.is_file():
            logger.warning("%s is missing: the losses of rows before the training are not known", self._file)
        self._read_before()

    def _read_before(self) -> list[float | None]:
        kept = read_json(self._file)
        with explain_damage(self._file):
            values = [None if row["before"] is None else float(row["before"]) for row in (kept or {"rows": ()})["rows"]]
        return values if len(values) == len(self._rows) else [None] * len(self._rows)

    def write_after(self, model: PreTrainedModel | PeftModel) -> None:
        """Measure the rows after the last step, and write their values beside those from before."""
        before = self._read_before()
        found = zip(self._list_places(), before, self._measure_rows(model), strict=True)
        self._write([MeasuredRow(*place, old, new) for place, old, new in found])

    def _write(self, rows: Sequence[MeasuredRow]) -> None:
        content = {
            "measure": self._measure.label,
            "is_mean": self._measure.is_mean,
            "preview": [shown for row in self._first for shown in self._show(row)],
            "rows": [asdict(row) for row in rows],
            "rankings": [self._rank(ranking, rows) for ranking in self._measure.rankings],
        }
        write_json(self._file, content)

    def _rank(self, ranking: Ranking, rows: Sequence[MeasuredRow]) -> dict[str, Any]:
        """Return the rows with the highest keys: their numbers and their texts; none before the end of the run."""
        keys = {
            number: ranking.key(row.before, row.after)
            for number, row in enumerate(rows)
            if row.before is not None and row.after is not None
        }
        best = sorted(keys, key=lambda number: -keys[number])[:_RANKED_ROWS]
        return {
            "title": ranking.title,
            "rows": [{"number": number, "sides": list(self._show(self._rows[number]))} for number in best],
        }

    def _list_places(self) -> Iterator[tuple[str, str, int]]:
        for row in self._rows:
            trained = sum(sum(marks) for _, _, marks in list_sides(row))
            yield row["origin"], row["place"]["file"], trained

    def _show(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        # The documents of pre-training have any length.
        short = {name: row[name][: self._limits.tokens] for name in ("input_ids", "labels")}
        for side in mark_sides({**row, **short}, self._tokenizer):
            yield {
                "origin": side.origin,
                "side": side.side,
                "tokens": len(side.token_ids),
                "trained": sum(side.trained),
                "pieces": list(_cut_pieces(side.pieces)),
            }

    def _measure_rows(self, model: PreTrainedModel | PeftModel) -> list[float | None]:
        """Return the value of each row, or None where it is no number. The model keeps its mode."""
        sides = [list(self._mark(row)) for row in self._rows]
        # Rows of about one length share a batch, so that little of it is padding.
        numbered = [(number, side) for number, row in enumerate(sides) for side in row]
        order = sorted(range(len(numbered)), key=lambda place: len(numbered[place][1].token_ids))
        was_training = model.training
        model.eval()
        with self._limits.computes():
            found = list(measure_losses(model, [numbered[place][1] for place in order], self._limits.batch_size))
        model.train(was_training)
        losses: dict[int, float] = dict(zip(order, found, strict=True))
        by_row: list[list[tuple[float, int]]] = [[] for _ in sides]
        for place, (number, side) in enumerate(numbered):
            by_row[number].append((losses[place], sum(side.trained)))
        values = [self._measure.find_value(one, row) for one, row in zip(by_row, self._rows, strict=True)]
        return [value if math.isfinite(value) else None for value in values]

    def _mark(self, row: Mapping[str, Any]) -> Iterator[MarkedTokens]:
        for _, ids, trained in list_sides(row):
            yield MarkedTokens(ids[: self._limits.tokens], [bool(mark) for mark in trained[: self._limits.tokens]])


@dataclass(frozen=True)
class SheetLimits:
    """How many rows are measured, how many tokens of each, and how many rows at a time; `computes` is the precision's context."""

    rows: int
    tokens: int
    batch_size: int
    computes: Callable[[], AbstractContextManager[Any]]


def _cut_pieces(pieces: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text, each shortened in its middle; of many pieces the last ones."""
    if len(pieces) > _MOST_PIECES:
        yield "… ", False
    for text, is_trained in pieces[-_MOST_PIECES:]:
        half = (_TRAINED_LETTERS if is_trained else _OTHER_LETTERS) // 2
        yield (text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"), is_trained
