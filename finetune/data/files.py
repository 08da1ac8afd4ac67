"""Read data files into raw rows, each with the place it came from."""

import csv
import difflib
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from finetune.errors import DataError

RawRow = tuple[str, dict[str, Any]]


def read_file(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a data file as `(where, row)`, such as `("data/my.jsonl, line 18", {...})`.

    Raises:
        DataError: the file is missing, empty, broken, or of a kind that is not known.
    """
    if not path.is_file():
        raise DataError(f"{path}: {_describe_missing(path)}")
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    reader = _READERS.get(suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the ending {suffix or '(none)'} is not known; known are {', '.join(_READERS)}")
    found = False
    for row in reader(path):
        found = True
        yield row
    if not found:
        raise DataError(f"{path}: the file holds no rows")


def _describe_missing(path: Path) -> str:
    if path.is_dir():
        return "is a folder; name the files in it"
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, names, n=1)
    return "does not exist" + (f"; {path.parent / matches[0]} does" if matches else "")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: is not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _check_object(_parse_json(line, where), where)


def _read_json(path: Path) -> Iterator[RawRow]:
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; is it JSON lines? then name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg}, column {error.colno}){hint}"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of rows; found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _check_object(row, where)


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error.msg}, column {error.colno})") from error


def _check_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with keys; found {type(row).__name__}")
    return row


def _read_csv(path: Path) -> Iterator[RawRow]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where}: has another number of fields than the {len(reader.fieldnames or [])} of the first line"
                )
            yield where, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file that can be read ({str(error).splitlines()[0]})") from error


_READERS: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".json.gz": _read_json,
    ".jsonl.gz": _read_json_lines,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}
