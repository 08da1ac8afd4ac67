"""What a recipe says about its rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TrainOn = Literal["assistant", "last", "all"]
# What a row becomes: one text with trained spans, a prompt with two answers, an answer with its label, or a prompt alone.
RowShape = Literal["sequence", "pair", "labelled", "prompt"]


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub; without a revision it is the newest one."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how much of it is taken: a number of rows, a weight among the sources that have one, or all.

    A weight is a share of all rows or, for sources that `weigh_text`, of all text.
    """

    place: Path | HubDataset
    weight: float | None = None
    rows: int | None = None
    weigh_text: bool = False


@dataclass(frozen=True)
class DataSettings:
    """Sources and what becomes of their rows; `held_out` is a share below 1 or a number of rows, `cache` a folder or None.

    `needs_answer` names what compares answers with the reference that each prompt must then carry.
    `notes` are what a person should know of the sources; `workers` processes encode the rows.
    """

    train: tuple[Source, ...]
    shape: RowShape = "sequence"
    evaluation: tuple[Source, ...] = ()
    held_out: int | float = 0
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    max_tokens: int = 2048
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    train_on: TrainOn = "assistant"
    substitute: Mapping[str, str] = field(default_factory=dict)
    deduplicate: bool = False
    needs_answer: str | None = None
    notes: tuple[str, ...] = ()
    workers: int = 1
    cache: Path | None = None
