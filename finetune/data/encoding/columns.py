"""Rows of tokens as Arrow columns, built for a whole batch at once, and their hash."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy
import pyarrow

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.encoding.row_encoder import TokenRow

_MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))


def make_record_batch(rows: Sequence[TokenRow]) -> pyarrow.RecordBatch:
    """Return rows as Arrow columns: `input_ids`, `labels`, `origin`, `is_cut`; what is apart in pairs, labelled answers and prompts."""
    input_ids = _make_lists([row.token_ids for row in rows])
    columns = {
        "input_ids": input_ids,
        "labels": _make_label_lists(rows, input_ids),
        "origin": pyarrow.array([row.source.origin for row in rows], pyarrow.string()),
        "is_cut": pyarrow.array([row.is_cut for row in rows], pyarrow.bool_()),
    }
    if rows[0].source.kind == "prompt":
        columns["prompt"] = pyarrow.array([row.source.row.messages for row in rows], _MESSAGES)
        columns["answer"] = pyarrow.array([row.source.row.answer for row in rows], pyarrow.string())
    if rows[0].rejected is None and rows[0].label is None:
        return pyarrow.RecordBatch.from_pydict(columns)
    starts = [row.spans[0][0] for row in rows]
    first = "completion_ids" if rows[0].rejected is None else "chosen_ids"
    columns["prompt_ids"] = _make_lists([row.token_ids[:start] for row, start in zip(rows, starts, strict=True)])
    columns[first] = _make_lists([row.token_ids[start:] for row, start in zip(rows, starts, strict=True)])
    if rows[0].rejected is None:
        columns["label"] = pyarrow.array([row.label for row in rows], pyarrow.bool_())
    else:
        sides = [(row.rejected or [])[start:] for row, start in zip(rows, starts, strict=True)]
        columns["rejected_ids"] = _make_lists(sides)
    return pyarrow.RecordBatch.from_pydict(columns)


def _make_lists(values: Sequence[Sequence[int]]) -> Any:
    lengths = numpy.fromiter(map(len, values), dtype=numpy.int32, count=len(values))
    offsets = numpy.concatenate([numpy.zeros(1, numpy.int32), numpy.cumsum(lengths, dtype=numpy.int32)])
    flat = numpy.fromiter(chain.from_iterable(values), dtype=numpy.int32, count=int(offsets[-1]))
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))


def _make_label_lists(rows: Sequence[TokenRow], input_ids: Any) -> Any:
    token_ids = input_ids.values.to_numpy()
    labels = numpy.full_like(token_ids, IGNORED_LABEL)
    for row, first in zip(rows, input_ids.offsets.to_numpy(), strict=False):
        for start, end in row.spans:
            labels[first + start : first + end] = token_ids[first + start : first + end]
    return pyarrow.ListArray.from_arrays(input_ids.offsets, pyarrow.array(labels))


class ColumnHash:
    """A hash of rows that come in batches of whatever size; without `origin`, as the same rows at another place are the same."""

    def __init__(self) -> None:
        self._parts: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, batch: pyarrow.RecordBatch) -> None:
        """Add the rows of a batch."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.type == pyarrow.list_(pyarrow.int32()):
                self._parts[f"lengths of {name}"].update(numpy.diff(column.offsets.to_numpy()).tobytes())
                self._parts[name].update(column.values.to_numpy().tobytes())
            elif name != "origin":
                self._parts[name].update("".join(f"{value!r}\n" for value in column.to_pylist()).encode())

    def finish(self, chosen: Mapping[str, Any]) -> str:
        """Return the hash of all rows and of the places that each split takes of them."""
        whole = hashlib.sha256()
        for name, part in sorted(self._parts.items()):
            whole.update(name.encode() + part.digest())
        for name, places in chosen.items():
            whole.update(name.encode() + places.tobytes())
        return whole.hexdigest()[:16]
