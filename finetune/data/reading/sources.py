"""The sources of a mixture: their rows, what they hold, and which rows of each are taken."""

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from finetune.data.reading.raw_files import RawRow, list_files, read_file
from finetune.data.settings import HubDataset, Source
from finetune.errors import DataError
from finetune.files.cache import hash_file

_BATCH_ROWS = 1000


def read_source(source: Source) -> Iterator[tuple[str, Iterator[RawRow]]]:
    """Yield the parts of a source, each with its name: the files of a path, or a data set of the hub as one.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if isinstance(source.place, HubDataset):
        yield _name_dataset(source.place), _read_dataset(source.place)
    else:
        for path in list_files(source.place):
            yield str(path), read_file(path)


def hash_source(source: Source) -> str:
    """Return a hash of the names and the content of a source.

    Raises:
        DataError: nothing is there.
    """
    is_hub = isinstance(source.place, HubDataset)
    files = _list_dataset_files(source.place) if isinstance(source.place, HubDataset) else list_files(source.place)
    digest = hashlib.sha256(str(source.place).encode())
    for file in files:
        # Where the hub's library keeps its files is no part of their content.
        digest.update(b"" if is_hub else str(file).encode())
        if file.is_file():
            digest.update(hash_file(file).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Draw:
    """The numbers of the rows that are taken of a source, from 0; `None` takes all. `note` says it to a person."""

    taken: frozenset[int] | None
    note: str = ""


def draw_rows(sources: Sequence[Source], seed: int) -> list[Draw]:
    """Choose the rows of every source by a seed, none of them twice.

    Sources with a weight share rows in proportion, or text where they weigh that, as much as the one that is used up first
    allows. A source whose rows are chosen is read once more only to be measured.

    Raises:
        DataError: a source holds fewer rows than are asked for.
    """
    sizes = [_measure_rows(source) for source in sources]
    # The largest mixture that repeats no row.
    whole = min(
        (sum(size) / source.weight for source, size in zip(sources, sizes, strict=True) if source.weight), default=0
    )
    draws = []
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if not source.weight and not source.rows:
            draws.append(Draw(None))
            continue
        order = random.Random(f"{seed} {number}").sample(range(len(size)), len(size))
        taken = _take_rows(source, order, size, whole)
        unit = " of the text" if source.weigh_text else ""
        reason = f"rows: {source.rows}" if source.rows else f"weight: {source.weight:.4g}{unit}"
        draws.append(
            Draw(taken, f"not drawn from {name_source(source)} ({reason}; {len(taken):,} of {len(size):,} are taken)")
        )
    return draws


def _measure_rows(source: Source) -> list[int]:
    """Return the size of every row of a source that takes part in a mixture: its text in bytes, or 1 where rows are counted."""
    if not source.weight and not source.rows:
        return []
    rows = (row for _, part in read_source(source) for _, row in part)
    return [_count_bytes(row.get("text", row)) if source.weigh_text else 1 for row in rows]


def _count_bytes(value: object) -> int:
    """Return the UTF-8 bytes of all text in a row: nearer to its tokens than its characters are, where scripts are mixed."""
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0


def _take_rows(source: Source, order: Sequence[int], size: Sequence[int], whole: float) -> frozenset[int]:
    """Return the first rows of an order that are asked for: so many, or up to their share of the whole, one at least."""
    if source.rows:
        if source.rows > len(size):
            raise DataError(
                f"{name_source(source)}: holds {len(size):,} rows where rows: {source.rows:,} are asked for; ask for fewer"
            )
        return frozenset(order[: source.rows])
    wanted = round(whole * (source.weight or 0))
    ends = itertools.accumulate(size[number] for number in order)
    return frozenset(
        number for place, (number, end) in enumerate(zip(order, ends, strict=True)) if not place or end <= wanted
    )


def name_source(source: Source) -> str:
    """Return a source as a person knows it."""
    return _name_dataset(source.place) if isinstance(source.place, HubDataset) else str(source.place)


def _name_dataset(place: HubDataset) -> str:
    revision = f"@{place.revision}" if place.revision else ""
    config = f"/{place.config}" if place.config else ""
    return f"{place.name}{revision}{config}/{place.split}"


def _read_dataset(place: HubDataset) -> Iterator[RawRow]:
    name, number = _name_dataset(place), 0
    for table in _load_dataset(place).with_format("arrow").iter(_BATCH_ROWS):
        for row in table.to_pylist():
            number += 1
            yield f"{name}, row {number}", row
    if not number:
        raise DataError(f"{name}: the data set holds no rows")


def _list_dataset_files(place: HubDataset) -> list[Path]:
    return [Path(file["filename"]) for file in _load_dataset(place).cache_files]


@lru_cache
def _load_dataset(place: HubDataset) -> Dataset:
    name = _name_dataset(place)
    try:
        return load_dataset(place.name, place.config, split=place.split, revision=place.revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{name}: the hub has no such data set or revision, or it is private or gated "
            f"({_first_line(error)}); check the name, or log in with `hf auth login`"
        ) from error
    except ValueError as error:  # an unknown config or split; the library lists those that there are
        raise DataError(f"{name}: {_first_line(error)}; name one with config: or split:") from error
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be loaded from the hub ({_first_line(error)}); check the connection, or download its files and "
            "give their path"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
