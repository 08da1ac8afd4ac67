"""Read the sources of a mixture: their raw rows, a hash of their content, and the choice of rows from each."""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

from finetune.compat import read_cache_only
from finetune.data.reading.arrow_rows import RawRow, list_rows
from finetune.data.reading.data_folders import choose_files, list_files
from finetune.data.reading.raw_files import read_file
from finetune.data.settings import HubDataset, Source
from finetune.errors import DataError, HubError, Place, describe_count
from finetune.files.cache import hash_file
from finetune.hub.commits import find_commit
from finetune.hub.faults import Asked, explain_fault
from finetune.hub.snapshots import find_listing

_BATCH_ROWS = 1000


def read_source(source: Source) -> Iterator[tuple[str, Iterator[RawRow]]]:
    """Yield `(name, rows)` for each file of a path, or once for a data set of the hub.

    Raises:
        DataError: the source does not exist, or cannot be read.
    """
    if isinstance(source.location, HubDataset):
        yield _name_dataset(source.location), _read_dataset(source.location)
    else:
        for path in list_files(source.location, source.split):
            yield str(path), read_file(path, source.encoding)


def describe_sources(sources: Iterable[Source]) -> tuple[str, ...]:
    """Return sentences that name the files that are not read in the folders of the sources."""
    paths = dict.fromkeys((source.location, source.split) for source in sources if isinstance(source.location, Path))
    return tuple(note for path, split in paths for note in choose_files(path, split).describe(path))


def hash_source(source: Source) -> str:
    """Return a hash of the file names and the content of a source.

    Raises:
        DataError: the source does not exist.
    """
    is_hub = isinstance(source.location, HubDataset)
    files = (
        _list_dataset_files(source.location)
        if isinstance(source.location, HubDataset)
        else list_files(source.location, source.split)
    )
    digest = hashlib.sha256(str(source.location).encode())
    for file in files:
        # The hub's library chooses the folder of its files, so their paths say nothing about their content.
        digest.update(b"" if is_hub else str(file).encode())
        if file.is_file():
            digest.update(hash_file(file).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Draw:
    """The rows that are taken from a source: `taken` holds their numbers, counted from 0, or is None for all rows.

    `note` is the sentence about the rows that are not taken.
    """

    taken: frozenset[int] | None
    note: str = ""


def draw_rows(sources: Sequence[Source], seed: int) -> list[Draw]:
    """Choose rows from every source by a seed, and no row twice.

    Sources with a weight contribute in proportion to it. The mixture is as large as it can be without repeating a row: it ends
    when the first source is used up. Its size is counted in rows, or in bytes of text for sources that `weigh_text`.
    A source with a weight or a number of rows is read twice: here its rows are measured.

    Raises:
        DataError: a source holds fewer rows than the recipe asks for.
    """
    sizes = [measure_rows(source) if source.weight or source.rows else [] for source in sources]
    mixture_size = min(
        (sum(size) / source.weight for source, size in zip(sources, sizes, strict=True) if source.weight), default=0
    )
    draws = []
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if not source.weight and not source.rows:
            draws.append(Draw(None))
            continue
        order = random.Random(f"{seed} {number}").sample(range(len(size)), len(size))
        taken = _take_rows(source, order, size, mixture_size)
        unit = " of the text" if source.weigh_text else ""
        reason = f"rows: {source.rows}" if source.rows else f"weight: {source.weight:.4g}{unit}"
        draws.append(
            Draw(taken, f"not drawn from {name_source(source)} ({reason}; {len(taken):,} of {len(size):,} are taken)")
        )
    return draws


def measure_rows(source: Source) -> list[int]:
    """Return the size of every row: its text in bytes for a source that weighs text, else 1."""
    rows = (row for _, part in read_source(source) for _, row in part)
    return [_measure_row(row) if source.weigh_text else 1 for row in rows]


def _measure_row(row: Mapping[str, object] | DataError) -> int:
    """Return the UTF-8 bytes of the text in a row; a row that cannot be read has none."""
    return 0 if isinstance(row, DataError) else _count_bytes(row.get("text", row))


def _count_bytes(value: object) -> int:
    """Return the UTF-8 bytes of all text in a row.

    Where scripts are mixed, bytes follow the number of tokens better than characters do.
    """
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0


def _take_rows(source: Source, order: Sequence[int], size: Sequence[int], mixture_size: float) -> frozenset[int]:
    """Return the first rows of `order`: `source.rows` of them, or as many as fill the source's share, at least one."""
    if source.rows:
        if source.rows > len(size):
            fault = f"holds {describe_count(len(size), 'row')} where rows: {source.rows:,} are asked for; ask for fewer"
            raise DataError(fault, Place(name_source(source)))
        return frozenset(order[: source.rows])
    wanted = round(mixture_size * (source.weight or 0))
    ends = itertools.accumulate(size[number] for number in order)
    return frozenset(
        number for count, (number, end) in enumerate(zip(order, ends, strict=True)) if not count or end <= wanted
    )


def name_source(source: Source) -> str:
    """Return the path of a source, or the name of a data set of the hub with its revision, config and split."""
    return _name_dataset(source.location) if isinstance(source.location, HubDataset) else str(source.location)


def _name_dataset(dataset: HubDataset) -> str:
    revision = f"@{dataset.revision}" if dataset.revision else ""
    config = f"/{dataset.config}" if dataset.config else ""
    return f"{dataset.name}{revision}{config}/{dataset.split}"


def _read_dataset(dataset: HubDataset) -> Iterator[RawRow]:
    name, number = _name_dataset(dataset), 0
    for table in _load_dataset(dataset).with_format("arrow").iter(_BATCH_ROWS):
        for row in list_rows(table, name):
            number += 1
            yield Place(name, number, "row"), row
    if not number:
        raise DataError("the data set holds no rows", Place(name))


def _list_dataset_files(dataset: HubDataset) -> list[Path]:
    return [Path(file["filename"]) for file in _load_dataset(dataset).cache_files]


@lru_cache
def _load_dataset(dataset: HubDataset) -> Dataset:
    place = Place(_name_dataset(dataset))
    asked = Asked(dataset.name, dataset.revision, "dataset")
    commit: str | None
    away = ""
    try:
        commit = find_listing(asked).commit
    except HubError as error:
        if not error.is_unreachable:
            raise DataError(str(error), place) from error
        away = f"{error}, or download its files and give their path"
        commit = find_commit(asked) or dataset.revision  # the library may have the data set in a cache of its own
    try:
        with read_cache_only(bool(away)):
            return load_dataset(dataset.name, dataset.config, split=dataset.split, revision=commit)
    except Exception as error:  # those of the connection's library have no common class with the system's
        fault = away or _explain_refusal(error, asked)  # the library says less about a hub that is away
        if fault is None:
            raise
        raise DataError(fault, place) from error


def _explain_refusal(error: Exception, asked: Asked) -> str | None:
    """Return what is wrong with a data set of the hub, and what to do; None for an error that is no user's."""
    # The library's own error about reading says nothing; its cause may also be a connection that broke off.
    cause = (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error
    text, files = _first_line(cause), "or download its files and give their path"
    if isinstance(error, DatasetNotFoundError):
        return (
            f"the hub has no such data set or revision, or it is private or gated ({text}); "
            "check the name, or log in with `hf auth login`"
        )
    if isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return "the data set holds no files of rows; download what it holds and give its path"
    if (fault := explain_fault(cause, asked)) is not None:
        return f"{fault}, {files}"
    if isinstance(error, DatasetGenerationError):
        return f"its files cannot be read as rows ({text}); name others with config:, {files}"
    if isinstance(error, RuntimeError):  # of a data set with a script
        return f"cannot be read without code of its own, which is never run ({text}); {files[3:]}"
    if isinstance(error, ValueError):  # an unknown config or split; the library lists those that there are
        return f"{text}; name one with config: or split:"
    return (
        f"cannot be loaded from the hub ({text}); check the connection, {files}" if isinstance(error, OSError) else None
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
