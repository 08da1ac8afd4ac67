"""Documents in full rows: one stream of tokens, cut every so many, in which no document sees another."""

from typing import Any

import numpy
import torch
from datasets import Dataset

from finetune.data.encoding.gates import IGNORED_LABEL

_DOCUMENTS_AT_ONCE = 1000


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of `length` tokens each; positions start again at 0 with every document, and with every row.

    A document goes on in the next row where one is full. The first token of a run of positions is never trained: what
    stands before it is another document, or not in the row. The last row is left out where it is not full, or filled
    with padding (a document of its own, untrained) where it is all there is or is to be kept.
    """

    def __init__(self, documents: Dataset, length: int, pad_token: int, *, keeps_last: bool = False) -> None:
        self._length, self._pad_token = length, pad_token
        self._tokens, self._is_trained, self._starts = _join(documents)
        rows, rest = divmod(len(self._tokens), length)
        self._rows = rows + (1 if rest and (keeps_last or not rows) else 0)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self._rows:
            raise IndexError(number)
        start = number * self._length
        tokens = self._tokens[start : start + self._length]
        ids = numpy.full(self._length, self._pad_token, numpy.int64)
        ids[: len(tokens)] = tokens
        first, last = numpy.searchsorted(self._starts, (start, start + self._length))
        is_start = numpy.zeros(self._length, bool)
        is_start[0] = is_start[self._starts[first:last] - start] = True
        is_start[len(tokens) : len(tokens) + 1] = True  # padding, where there is any
        places = numpy.arange(self._length)
        positions = places - numpy.maximum.accumulate(numpy.where(is_start, places, 0))
        is_trained = ~is_start
        is_trained[: len(tokens)] &= self._is_trained[start : start + self._length]
        is_trained[len(tokens) :] = False
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": numpy.where(is_trained, ids, IGNORED_LABEL),
        }


def _join(documents: Dataset) -> tuple[Any, Any, Any]:
    """Return all tokens in one array, whether each is trained, and where documents start."""
    tokens, trained, lengths = [], [], []
    for batch in documents.with_format("arrow").iter(_DOCUMENTS_AT_ONCE):
        ids, labels = (batch.column(name).combine_chunks() for name in ("input_ids", "labels"))
        tokens.append(ids.flatten().to_numpy().astype(numpy.int32))
        trained.append(labels.flatten().to_numpy() != IGNORED_LABEL)
        lengths.append(ids.value_lengths().to_numpy())
    ends = numpy.cumsum(numpy.concatenate(lengths), dtype=numpy.int64)
    return numpy.concatenate(tokens), numpy.concatenate(trained), numpy.concatenate([[0], ends[:-1]])
