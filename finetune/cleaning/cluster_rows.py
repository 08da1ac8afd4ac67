"""Read the rows of a recipe in parts, for the pipelines of other programs, and write what stays as `finetune clean` writes it.

A row travels as one line of ASCII, because not every program takes every text that a row may hold.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.check.recipes import load_recipe
from finetune.cleaning.clean_run import refuse_row
from finetune.cleaning.row_spool import add_provenance, read_checked_rows, read_content, write_content
from finetune.cleaning.steps.text_steps import PARTS, find_shared, read_held_groups
from finetune.data.formats.rows import hash_row
from finetune.data.lint.near_duplicates import sign_text
from finetune.data.lint.row_writer import RowWriter
from finetune.data.reading.data_folders import list_files
from finetune.data.settings import Source
from finetune.errors import Place
from finetune.training.training_rows import open_data


@dataclass(frozen=True)
class TravellingRow:
    """A row on its way: its content and its place as ASCII, a hash of all that is asked and trained, and the kinds found in it."""

    content: str
    place: str
    digest: str
    found: list[str]


def list_parts(sources: Iterable[Source]) -> list[Source]:
    """Return the smallest parts that sources are read in: files, and data sets of the hub."""
    return [
        part
        for source in sources
        for part in (
            [replace(source, location=path) for path in list_files(source.location, source.split)]
            if isinstance(source.location, Path)
            else [source]
        )
    ]


def read_rows(recipe: str, settings: Sequence[str], rank: int, ranks: int) -> Iterator[TravellingRow]:
    """Yield the rows of one of `ranks` shares of the files; shares are consecutive, so that earlier rows have lower ranks.

    Unreadable rows leave here where the recipe says so.

    Raises:
        DataError: a row cannot be read, and no step leaves such rows out.
    """
    resolved = load_recipe(recipe, list(settings))
    data, tokenizer, template = open_data(resolved)
    parts = list_parts(data.train)
    share = tuple(parts[rank * len(parts) // ranks : (rank + 1) * len(parts) // ranks])
    for row, found in read_checked_rows(
        replace(data, train=share), tokenizer, template, resolved.recipe.clean.thresholds
    ):
        if row.fault is None:
            place = json.dumps([row.place.file, row.place.line, row.place.unit])
            yield TravellingRow(write_content(row), place, hash_row(row.row).hex(), list(found))
        elif not resolved.recipe.clean.unreadable:
            raise refuse_row(row.fault[1], row.place)


def sign_part(content: str, part: str, size: int, slots: int) -> list[int]:
    """Return the signature by which `finetune clean` compares a part of a row, of `slots` numbers; none for a text that is too short."""
    signature = sign_text(PARTS[part](read_content(content)), size, slots)
    return [] if signature is None else signature.digest()


class Decontaminator:
    """Tells which rows share words with evaluation sets, which are read at the first row."""

    def __init__(self, against: Sequence[str], task_data: str, size: int) -> None:
        self._against, self._task_data, self._size = against, task_data, size
        self._held: dict[str, Place] | None = None

    def is_clean(self, content: str) -> bool:
        """Return whether a row shares no group of words with an evaluation set."""
        if self._held is None:
            self._held, _ = read_held_groups(self._against, self._task_data, self._size)
        return find_shared(read_content(content), self._held, self._size) is None


def write_rows(rows: Iterable[tuple[str, str]], folder: Path, passed: Sequence[str]) -> None:
    """Write rows, each as `(content, place)`, into a folder, one file for each source, with their provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.iterdir():  # of a task that was stopped
        earlier.unlink()
    writer = RowWriter(folder)
    try:
        for content, place in rows:
            file, line, unit = json.loads(place)
            raw = read_content(content).raw or {}
            writer.write("train", file, add_provenance(raw, Place(file, line, unit), passed))
    finally:
        writer.close()
