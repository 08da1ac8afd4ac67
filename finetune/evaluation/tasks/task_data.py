"""Read the rows of a task and its exemplars: from a file, from a folder, or from the hub."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.sources import read_source
from finetune.data.settings import HubDataset, Source
from finetune.errors import DataError, Place
from finetune.evaluation.tasks.task_names import (
    EXEMPLAR_ENDINGS,
    ROW_ENDINGS,
    Shots,
    Task,
    describe_wanted,
    find_in_folder,
)
from finetune.files.folders import expand_home

# MBPP shows and runs the first three tests of a row.
LEAST_TEXTS = 3

Rows = list[dict[str, Any]]


def read_task_rows(task: Task, data: Path | None, is_only_task: bool, option: str = "--task-data") -> Rows:
    """Read the rows of a task from `data`, a file or a folder, or from the hub where it is None.

    A message names `option`, by which a person gives `data`.

    Raises:
        DataError: they cannot be found or read, or a row lacks a column.
    """
    what = f"a row of {task.name}"
    if data is None:
        return _read_hub(task.hub, task, what, option)
    return _read_rows(_find_file(task, expand_home(data), is_only_task), task, what)


def read_exemplars(task: Task, shots: Shots | None, file: Path | None, option: str = "--exemplars") -> Rows:
    """Read the exemplars of a task from a file or from a folder that holds those of several tasks, or from the hub where the protocol takes them from there.

    A message names `option`, by which a person gives `file`.

    Raises:
        DataError: they cannot be read, a row lacks a column, or there are too few.
    """
    if shots is None:
        return []
    if file is not None:
        path = expand_home(file)
        rows = _read_rows(_find_in_folder(task, path, EXEMPLAR_ENDINGS) if path.is_dir() else path, task, "an exemplar")
    elif shots.hub_split is not None:
        rows = _read_hub(replace(task.hub, split=shots.hub_split), task, "an exemplar", option)
    else:
        return []
    if len(rows) < shots.count:
        raise DataError(
            f"holds {len(rows)} exemplars where {shots.count} are needed", Place(str(file or task.hub.name))
        )
    return rows


def hash_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Return a hash of the content of rows."""
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _find_file(task: Task, data: Path, is_only_task: bool) -> Path:
    if not data.is_dir():
        if data.is_file() and not is_only_task:
            raise DataError(
                f"is one file for several tasks; give a folder that holds {task.name}.jsonl and the others",
                Place(str(data)),
            )
        return data
    return _find_in_folder(task, data, ROW_ENDINGS)


def _find_in_folder(task: Task, folder: Path, endings: Sequence[str]) -> Path:
    found = find_in_folder(task, folder, endings)
    if found is None:
        raise DataError(describe_wanted(task, endings), Place(str(folder)))
    return found


def _read_hub(dataset: HubDataset, task: Task, what: str, option: str) -> Rows:
    try:
        return _read_rows(dataset, task, what)
    except DataError as error:
        raise DataError(f"{error.fault}; {option} names a file instead", error.place) from error


def _read_rows(location: Path | HubDataset, task: Task, what: str) -> Rows:
    rows: Rows = []
    for _, part in read_source(Source(location, split="evaluation")):
        for place, raw in part:
            row = require_row(raw)
            _check_columns(row, task, what, place)
            kept = {name: row[name] for name in (*task.columns, *task.lists)}
            rows.append(kept | {name: row[name] for name in task.numbers if name in row})
    return rows


def _check_columns(row: Mapping[str, Any], task: Task, what: str, place: Place) -> None:
    found = ", ".join(map(str, row)) or "nothing"
    columns = ", ".join((*task.columns, *task.lists))
    if lacks := [name for name in task.columns if not isinstance(row.get(name), str)]:
        raise DataError(f"has no text in {', '.join(lacks)}; {what} has {columns}; found {found}", place)
    for name in task.lists:
        texts = row.get(name)
        if not isinstance(texts, list) or len(texts) < LEAST_TEXTS or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"has no list of at least {LEAST_TEXTS} texts in {name}; {what} has {columns}; found {found}", place
            )
