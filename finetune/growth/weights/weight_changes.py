"""Compare the weights of two checkpoints by the rows that were kept of both."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.growth.weights.weight_statistics import TensorStatistics, find_kind, read_statistics
from finetune.yulan.tensors import open_tensors


@dataclass(frozen=True)
class TensorChange:
    """How a tensor changed since the checkpoint before, on the rows that are kept of it.

    `cosine` is that of the two tensors as vectors; `change` is the norm of their difference over the norm of the earlier one. For a table of
    tokens `row_cosine` is the mean of the cosines of its rows.
    """

    cosine: float | None
    change: float | None
    row_cosine: float | None = None


@dataclass(frozen=True)
class TensorEntry:
    """The figures of a tensor of one checkpoint; `since` is None for the first checkpoint, and where the shapes differ."""

    statistics: TensorStatistics
    since: TensorChange | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        none = TensorChange(None, None)
        return {**asdict(self.statistics), **asdict(self.since or none)}


def read_weights(folder: Path, before: Path | None) -> tuple[TensorEntry, ...]:
    """Read the figures of a checkpoint, and compare it with the one before it."""
    found = read_statistics(folder)
    if before is None or not found:
        return tuple(TensorEntry(statistics, None) for statistics in found)
    earlier = {statistics.name: statistics for statistics in read_statistics(before)}
    entries = []
    old, new = open_tensors(before), open_tensors(folder)
    for statistics in found:
        same, since = earlier.get(statistics.name), None
        if same is not None and old.shape(same.name) == new.shape(same.name):
            kind = find_kind(same.name)
            first, last = old.read(same.name).double() * same.scale, new.read(same.name).double() * statistics.scale
            since = _compare(first, last, kind is not None and kind.is_table)
        entries.append(TensorEntry(statistics, since))
    return tuple(entries)


def _compare(before: torch.Tensor, after: torch.Tensor, is_table: bool) -> TensorChange:
    norm = before.norm()
    both = norm * after.norm()
    cosine = float((before * after).sum() / both) if both > 0 else None
    change = float((after - before).norm() / norm) if norm > 0 else None
    rows = float(torch.cosine_similarity(before, after, dim=1).mean()) if is_table else None
    return TensorChange(cosine, change, rows)
