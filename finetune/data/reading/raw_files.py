"""Read data files as raw rows (JSON objects as dicts), each with its place."""

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow

from finetune.data.reading.arrow_rows import RawRow, read_arrow, read_parquet
from finetune.data.reading.json_lists import JsonList
from finetune.errors import DataError, Place


def read_file(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a data file as `(place, row)`, such as `(Place("data/my.jsonl", 18), {...})`.

    Raises:
        DataError: the file is missing, empty, broken, or of an unknown kind.
    """
    whole = Place(str(path))
    if not path.is_file():
        raise DataError(describe_missing(path), whole)
    suffix = "".join(path.suffixes[-2:]) if path.suffix.lower() in _COMPRESSIONS else path.suffix
    kind = path.with_suffix("").suffix if path.suffix.lower() in _COMPRESSIONS else path.suffix
    reader = _READERS.get(kind.lower())
    if reader is None:
        raise DataError(
            f"the ending {suffix or '(none)'} is not known; known are {', '.join(_READERS)}, the text kinds also with "
            f"{' or '.join(_COMPRESSIONS)}",
            whole,
        )
    found = False
    for row in reader(path):
        found = True
        yield row
    if not found:
        raise DataError("the file holds no rows", whole)


def describe_missing(path: Path) -> str:
    """Say that a file does not exist, and which similar one does."""
    if path.is_dir():
        return "is a folder of no data files"
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, names, n=1)
    return "does not exist" + (f"; {path.parent / matches[0]} does" if matches else "")


def has_known_ending(path: Path) -> bool:
    """Tell whether a file is of a kind that can be read, by its name."""
    kind = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return kind.suffix.lower() in _READERS


def list_endings() -> str:
    """Return the endings of the files that can be read, for a message."""
    return ", ".join(_READERS)


def _read_lines(path: Path, most_bytes: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield `(number, line)` without holding the file in memory. Only a newline ends a line, as in an editor.

    Raises:
        DataError: a line is no text or longer than `most_bytes`, or the file cannot be unpacked.
    """
    offset = 0
    try:
        for number, line in enumerate(_split_lines(path, most_bytes), 1):
            yield number, _decode(line, path, number, offset)
            offset += len(line) + 1
    except (pyarrow.ArrowInvalid, OSError, EOFError) as error:
        raise DataError(f"cannot be read ({error})", Place(str(path))) from error


def _split_lines(path: Path, most_bytes: int | None) -> Iterator[bytes]:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    packed_bytes, read_bytes, number = path.stat().st_size, 0, 0
    with pyarrow.input_stream(str(path), compression=compression, buffer_size=1 << 20) as stream:
        # The pieces of a line that has not ended yet: joining them at its end takes a time that grows with its length only.
        pieces: list[bytes] = []
        held_bytes = 0
        while block := stream.read(1 << 20):
            read_bytes += len(block)
            if compression and read_bytes > _MOST_UNPACKED and read_bytes > _MOST_TIMES * packed_bytes:
                fault = f"unpacks to more than {_MOST_TIMES} times its {packed_bytes:,} bytes; unpack it yourself if it is meant so"
                raise DataError(fault, Place(str(path)))
            *ends, rest = block.split(b"\n")
            for end in ends:
                number += 1
                yield b"".join([*pieces, end])
                pieces, held_bytes = [], 0
            if rest:
                pieces.append(rest)
                held_bytes += len(rest)
            if most_bytes is not None and held_bytes > most_bytes:
                fault = f"is longer than {most_bytes // 10**6} MB, which no model can read; split it or remove it"
                raise DataError(fault, Place(str(path), number + 1))
        if pieces:
            yield b"".join(pieces)


def _decode(line: bytes, path: Path, number: int, offset: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {offset + error.start}); save the file as UTF-8"
        raise DataError(fault, Place(str(path), number)) from error


def _read_text(path: Path) -> str:
    return "\n".join(line for _, line in _read_lines(path))


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    for number, line in _read_lines(path, _MOST_ROW_BYTES):
        if line.strip():
            place = Place(str(path), number)
            yield place, _check_object(_parse_json(line, place), place)


def _read_json(path: Path) -> Iterator[RawRow]:
    for number, row in enumerate(JsonList(path, _read_lines(path)).read(), 1):
        place = Place(str(path), number, "row")
        yield place, _check_object(row, place)


def _read_text_file(path: Path) -> Iterator[RawRow]:
    """Yield the whole text file as one document."""
    text = _read_text(path)
    if text.strip():
        yield Place(str(path), 1), {"text": text}


def _parse_json(line: str, place: Place) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise DataError("is nested too deeply", place) from error
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON ({error.msg}, column {error.colno})", place) from error


def _check_object(row: Any, place: Place) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"must be an object with keys; found {type(row).__name__}", place)
    return row


def _read_csv(path: Path) -> Iterator[RawRow]:
    reader = csv.DictReader((line + "\n" for _, line in _read_lines(path)), strict=True)
    try:
        for row in reader:
            place = Place(str(path), reader.line_num)
            if None in row or None in row.values():
                count = len(reader.fieldnames or [])
                raise DataError(f"has another number of fields than the {count} of the first line", place)
            yield place, dict(row)
    except csv.Error as error:
        raise DataError(f"broken CSV ({error})", Place(str(path), reader.line_num)) from error


_MOST_ROW_BYTES = 32 * 10**6
# Text shrinks to a tenth or so; what unpacks to so many times its size was made to fill a memory or a disk.
_MOST_UNPACKED, _MOST_TIMES = 1 << 28, 200
_COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
_READERS: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": _read_text_file,
}
