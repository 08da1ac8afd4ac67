"""Pack documents into rows of equal length without padding; attention does not cross documents."""

from typing import Any

import numpy
import torch
from datasets import Dataset

from finetune.data.encoding.gates import IGNORED_LABEL

_BATCH_DOCUMENTS = 1000


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of `length` tokens, cut from all documents joined into one stream.

    Each row holds `input_ids`, `position_ids` and `labels`, int64 arrays of shape `(length,)`. Positions start at 0 with every
    document and with every row. A document continues in the next row where a row is full. The first token at position 0 is never
    trained, because the tokens before it are not in the row or belong to another document.
    A last row that is not full is left out. It is filled with untrained padding instead, a document of its own, where it is the
    only row or `keeps_last` is set.
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
        is_start[len(tokens) : len(tokens) + 1] = True  # the padding is a document of its own
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
    """Return all tokens (int32), whether each is trained (bool), both `(tokens,)`, and where documents start `(documents,)`."""
    tokens, trained, lengths = [], [], []
    for batch in documents.with_format("arrow").iter(_BATCH_DOCUMENTS):
        ids, labels = (batch.column(name).combine_chunks() for name in ("input_ids", "labels"))
        tokens.append(ids.flatten().to_numpy().astype(numpy.int32))
        trained.append(labels.flatten().to_numpy() != IGNORED_LABEL)
        lengths.append(ids.value_lengths().to_numpy())
    ends = numpy.cumsum(numpy.concatenate(lengths), dtype=numpy.int64)
    return numpy.concatenate(tokens), numpy.concatenate(trained), numpy.concatenate([[0], ends[:-1]])
