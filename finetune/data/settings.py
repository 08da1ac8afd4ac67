"""The settings of the data pipeline, as a recipe gives them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TrainOn = Literal["assistant", "last", "all"]
# What the rows of a source are for; a folder of splits is read accordingly.
SplitName = Literal["train", "evaluation"]
# What a method trains on: one text with trained spans, a prompt with a chosen and a rejected answer, a prompt with one answer
# and its label, or a prompt alone.
RowShape = Literal["sequence", "pair", "labelled", "prompt"]


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub. `revision` is None for the newest one."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True)
class Source:
    """A file, folder, glob or data set of the hub that rows are read from, and how many of its rows are taken.

    All rows are taken where neither `rows` nor `weight` is given. `weight` is relative to the weights of the other sources;
    it divides the rows or, for sources that `weigh_text`, the bytes of text. `split` says what the rows are for: of a folder
    that holds splits, only the files of one are read. `encoding` is that of text files.
    """

    location: Path | HubDataset
    weight: float | None = None
    rows: int | None = None
    weigh_text: bool = False
    split: SplitName = "train"
    encoding: str = "utf-8"


@dataclass(frozen=True)
class DataSettings:
    """The sources, and how their rows are read, split, cut and encoded.

    `columns` maps a format's keys to the keys of the files. `substitute` maps placeholders such as `{{name}}` to texts.
    `held_out` is a share below 1, or a number of rows, to take from `train` for evaluation.
    `bad_rows` says whether a row that cannot be used is an error or is left out; `merge_turns` joins turns of one speaker.
    `needs_answer` names the reward that compares answers with references; each prompt must then have a reference answer.
    `notes` are sentences about the sources for the report. `workers` is the number of processes that encode rows.
    `cache` is the folder for prepared rows, or None to keep them in memory.
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
    bad_rows: Literal["error", "drop"] = "error"
    merge_turns: bool = False
    needs_answer: str | None = None
    notes: tuple[str, ...] = ()
    workers: int = 1
    cache: Path | None = None
