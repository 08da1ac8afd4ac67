"""Turn batches of token rows into Arrow columns, and hash the columns."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy
import pyarrow

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.encoding.row_encoder import TokenRow

_PLACE = pyarrow.struct([("file", pyarrow.string()), ("line", pyarrow.int64()), ("unit", pyarrow.string())])
# These columns say where a row stood. The same row elsewhere is the same row, so the hash leaves them out.
_UNHASHED = ("origin", "place")
_MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))


def make_record_batch(rows: Sequence[TokenRow]) -> pyarrow.RecordBatch:
    """Return rows of one shape as Arrow columns; `Splits` lists the columns."""
    input_ids = _make_lists([row.token_ids for row in rows])
    columns = {
        "input_ids": input_ids,
        "labels": _make_label_lists(rows, input_ids),
        "origin": pyarrow.array([str(row.source.place) for row in rows], pyarrow.string()),
        "place": pyarrow.array([vars(row.source.place) for row in rows], _PLACE),
        "is_cut": pyarrow.array([row.is_cut for row in rows], pyarrow.bool_()),
    }
    if rows[0].source.kind == "prompt":
        columns["prompt"] = pyarrow.array([row.source.row.messages for row in rows], _MESSAGES)
        columns["answer"] = pyarrow.array([row.source.row.answer for row in rows], pyarrow.string())
    if rows[0].rejected is not None or rows[0].label is not None:
        columns |= _make_answer_columns(rows)
    return pyarrow.RecordBatch.from_pydict(columns)


def _make_answer_columns(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Return the prompts and answers of pairs or labelled answers as columns of their own."""
    starts = [row.spans[0][0] for row in rows]
    prompts = _make_lists([row.token_ids[:start] for row, start in zip(rows, starts, strict=True)])
    answers = _make_lists([row.token_ids[start:] for row, start in zip(rows, starts, strict=True)])
    if rows[0].rejected is None:
        labels = pyarrow.array([row.label for row in rows], pyarrow.bool_())
        return {"prompt_ids": prompts, "completion_ids": answers, "label": labels}
    rejected = [(row.rejected or [])[start:] for row, start in zip(rows, starts, strict=True)]
    return {"prompt_ids": prompts, "chosen_ids": answers, "rejected_ids": _make_lists(rejected)}


def _make_lists(values: Sequence[Sequence[int]]) -> Any:
    """Return lists of token ids as an Arrow list array of int32, shape `(rows, tokens of each)`."""
    lengths = numpy.fromiter(map(len, values), dtype=numpy.int32, count=len(values))
    offsets = numpy.concatenate([numpy.zeros(1, numpy.int32), numpy.cumsum(lengths, dtype=numpy.int32)])
    flat = numpy.fromiter(chain.from_iterable(values), dtype=numpy.int32, count=int(offsets[-1]))
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))


def _make_label_lists(rows: Sequence[TokenRow], input_ids: Any) -> Any:
    """Return the labels of rows in the shape of `input_ids`: the token ids within trained spans, -100 elsewhere."""
    token_ids = input_ids.values.to_numpy()
    labels = numpy.full_like(token_ids, IGNORED_LABEL)
    for row, first in zip(rows, input_ids.offsets.to_numpy(), strict=False):
        for start, end in row.spans:
            labels[first + start : first + end] = token_ids[first + start : first + end]
    return pyarrow.ListArray.from_arrays(input_ids.offsets, pyarrow.array(labels))


class ColumnHash:
    """A hash of rows that come in batches. It depends neither on the size of the batches nor on where the rows stood."""

    def __init__(self) -> None:
        self._parts: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, batch: pyarrow.RecordBatch) -> None:
        """Add the rows of a batch."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.type == pyarrow.list_(pyarrow.int32()):
                self._parts[f"lengths of {name}"].update(numpy.diff(column.offsets.to_numpy()).tobytes())
                self._parts[name].update(column.values.to_numpy().tobytes())
            elif name not in _UNHASHED:
                self._parts[name].update("".join(f"{value!r}\n" for value in column.to_pylist()).encode())

    def finish(self, chosen: Mapping[str, Any]) -> str:
        """Return the hash of all rows and of `chosen`, the indices of the rows of each split."""
        whole = hashlib.sha256()
        for name, part in sorted(self._parts.items()):
            whole.update(name.encode() + part.digest())
        for name, indices in chosen.items():
            whole.update(name.encode() + indices.tobytes())
        return whole.hexdigest()[:16]
