"""Read Arrow and Parquet files as raw rows: what Arrow adds to a row is left out, and JSON that `datasets` stores as text is read.

All structs of a column have the same fields, so Arrow fills up those that an object did not have with null. Such a null cannot be
told from one that was written, so no field of a struct that is null is part of a row. A null within stored JSON is kept.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from finetune.data.reading.json_lists import ROW_DECODER
from finetune.errors import DataError, Place

# A row with its place, or the error that says why it cannot be read.
RawRow = tuple[Place, dict[str, Any] | DataError]
_Reader = Callable[[Any], Any]


def require_row(raw: dict[str, Any] | DataError) -> dict[str, Any]:
    """Return a row, or raise the error that stands in its place.

    Raises:
        DataError: the row cannot be read.
    """
    if isinstance(raw, DataError):
        raise raw
    return raw


def read_arrow(path: Path) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file, a stream or a file of record batches.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches = iter(pyarrow.ipc.open_stream(source))
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from _number_rows(batches, path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        fault = f"is not an Arrow file that can be read ({str(error).splitlines()[0]})"
        raise DataError(fault, Place(str(path))) from error


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _number_rows(file.iter_batches(), path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        fault = f"is not a Parquet file that can be read ({str(error).splitlines()[0]})"
        raise DataError(fault, Place(str(path))) from error


def _number_rows(batches: Iterator[Any], path: Path) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in list_rows(batch, str(path)):
            number += 1
            yield Place(str(path), number, "row"), row


def list_rows(table: Any, name: str) -> list[dict[str, Any]]:
    """Return the rows of a record batch or table of the file or data set `name`.

    Raises:
        DataError: a value that is stored as JSON is none.
    """
    stored = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(stored).get("info", {}).get("features") or {} if stored else {}
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        values = column.to_pylist(maps_as_pydicts="lossy")
        read = _make_reader(field.type, features.get(field.name), Place(name))
        columns.append(values if read is None else [read(value) for value in values])
    names = table.schema.names
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _make_reader(kind: Any, feature: Any, place: Place) -> _Reader | None:
    """Return what makes of an Arrow value the value that was written, or None where they are the same.

    `feature` is the type as `datasets` describes it in the file, where it does.
    """
    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return lambda value: _parse(value, place)
        kind = kind.storage_type
    if isinstance(feature, dict) and feature.get("_type") == "Json":
        return lambda value: _parse(value, place)
    if pyarrow.types.is_struct(kind):
        return _make_struct_reader(kind, feature, place)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        inner = feature.get("feature") if isinstance(feature, dict) else feature[0] if feature else None
        read = _make_reader(kind.value_type, inner, place)
        return None if read is None else lambda values: None if values is None else [read(value) for value in values]
    return None


def _make_struct_reader(kind: Any, feature: Any, place: Place) -> _Reader:
    known = feature if isinstance(feature, dict) else {}
    readers = {field.name: _make_reader(field.type, known.get(field.name), place) for field in kind}
    changed = [(name, read) for name, read in readers.items() if read is not None]

    def read_struct(value: Any) -> Any:
        if value is None:
            return None
        kept = {name: inner for name, inner in value.items() if inner is not None}
        for name, read in changed:
            if name in kept:
                kept[name] = read(kept[name])
        return kept

    return read_struct


def _parse(value: Any, place: Place) -> Any:
    if not isinstance(value, str | bytes):
        return value
    try:
        return ROW_DECODER.decode(value if isinstance(value, str) else value.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"holds a value that is stored as JSON and is none ({error})", place) from error
