"""Read data files as raw rows (JSON objects as dicts), each with its place."""

import csv
import difflib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.reading.arrow_rows import RawRow, read_arrow, read_parquet
from finetune.data.reading.file_kinds import COMPRESSIONS, KINDS, find_kind
from finetune.data.reading.json_lists import HUGE_NUMBER, ROW_DECODER, JsonList, UnusableJsonError
from finetune.data.reading.text_lines import (
    OLD_LINE_ENDS,
    UTF8,
    NumberedLine,
    ends_as_on_old_macs,
    read_lines,
    read_lines_or_faults,
)
from finetune.errors import DataError, Place


def read_file(path: Path, encoding: str = UTF8) -> Iterator[RawRow]:
    """Yield the rows of a data file as `(place, row)`, such as `(Place("data/my.jsonl", 18), {...})`.

    In place of a row that is broken stands the error that says so, where the rows after it can be read.

    Raises:
        DataError: the file is missing, empty, broken, or of an unknown kind.
    """
    whole = Place(str(path))
    if not path.is_file():
        raise DataError(describe_missing(path), whole)
    suffix = "".join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSIONS else path.suffix
    reader = READERS.get(find_kind(path))
    if reader is None:
        raise DataError(
            f"the ending {suffix or '(none)'} is not known; known are {', '.join(KINDS)}, the text kinds also with "
            f"{' or '.join(COMPRESSIONS)}",
            whole,
        )
    found = False
    for row in reader(path, encoding):
        found = True
        yield row
    if not found:
        raise DataError("the file holds no rows", whole)


def describe_missing(path: Path) -> str:
    """Say that a file does not exist, and which similar one does."""
    if path.is_dir():
        return "is a folder of no data files"
    if path.exists():
        return "is a pipe or a device; write its rows into a file"
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, names, n=1)
    return "does not exist" + (f"; {path.parent / matches[0]} does" if matches else "")


def _read_json(path: Path, encoding: str) -> Iterator[RawRow]:
    """Yield the rows of a JSON list or of JSON lines, whichever the file holds; its name does not decide."""
    lines = read_lines_or_faults(path, encoding, None if find_kind(path) == ".json" else _MOST_ROW_BYTES)
    head: list[NumberedLine] = []
    for number, line in lines:
        head.append((number, line))
        if isinstance(line, DataError) or line.strip():
            break
    whole = itertools.chain(head, lines)
    first = head[-1][1] if head else ""
    if isinstance(first, str) and _begins_list(first, path):
        yield from _read_json_list(path, whole)
    else:
        yield from _read_json_lines(path, whole)


def _begins_list(first: str, path: Path) -> bool:
    """Tell by its first line whether a file holds one list, or an object that takes several lines, and no JSON lines."""
    if first.lstrip().startswith("["):
        return True
    if find_kind(path) != ".json":
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def _read_json_list(path: Path, lines: Iterator[NumberedLine]) -> Iterator[RawRow]:
    for number, row in enumerate(JsonList(path, _refuse_faults(lines)).read(), 1):
        place = Place(str(path), number, "row")
        yield place, _check_object(row, place)


def _refuse_faults(lines: Iterator[NumberedLine]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if isinstance(line, DataError):
            raise line
        yield number, line


def _read_json_lines(path: Path, lines: Iterator[NumberedLine]) -> Iterator[RawRow]:
    for number, line in lines:
        place = Place(str(path), number)
        if isinstance(line, DataError):
            yield place, line
        elif line.strip():
            yield place, _parse_json(line, place)


def _read_text_file(path: Path, encoding: str) -> Iterator[RawRow]:
    """Yield the whole text file as one document."""
    text = "\n".join(line for _, line in read_lines(path, encoding))
    if text.strip():
        yield Place(str(path), 1), {"text": text}


def _parse_json(line: str, place: Place) -> dict[str, Any] | DataError:
    try:
        return _check_object(ROW_DECODER.decode(line), place)
    except UnusableJsonError as error:
        return DataError(str(error), place)
    except RecursionError:
        return DataError("is nested too deeply", place)
    except json.JSONDecodeError as error:
        hint = f"; {OLD_LINE_ENDS}" if ends_as_on_old_macs(line) else ""
        return DataError(f"broken JSON ({error.msg}, column {error.colno}){hint}", place)
    except ValueError:
        return DataError(HUGE_NUMBER, place)


def _check_object(row: Any, place: Place) -> dict[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    return DataError(f"must be an object with keys; found {type(row).__name__}", place)


def _read_csv(path: Path, encoding: str, delimiter: str = ",") -> Iterator[RawRow]:
    # Python refuses cells above 131,072 characters; the limit is one for all readers of the process.
    csv.field_size_limit(_LONGEST_CELL)
    lines = (line + "\n" for _, line in read_lines(path, encoding))
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    names: list[str] | None = None
    while True:
        place = Place(str(path), reader.line_num + 1)  # a row begins after the last line of the row before
        try:
            cells = next(reader, None)
        except csv.Error as refusal:
            # A cell may hold carriage returns; that the reader stops at one means that nothing quotes it.
            fault = OLD_LINE_ENDS if "new-line character" in str(refusal) else f"broken CSV ({refusal})"
            raise DataError(fault, place) from refusal
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = _read_names(cells, place, delimiter)
        elif len(cells) != len(names):
            fault = (
                f"has {len(cells)} fields where the first line has {len(names)}; quote cells that hold a {delimiter!r}"
            )
            yield place, DataError(fault, place)
        else:
            yield place, dict(zip(names, cells, strict=True))


def _read_names(cells: Sequence[str], place: Place, delimiter: str) -> list[str]:
    if len(cells) == 1 and (others := [mark for mark in ",;\t|" if mark in cells[0] and mark != delimiter]):
        kind = "CSV" if delimiter == "," else "TSV"
        tab = "; a file with tabs is named .tsv" if others[0] == "\t" else ""
        fault = f"names one column, {cells[0]!r}: its columns are separated by {others[0]!r}, and those of {kind} by {delimiter!r}"
        raise DataError(f"{fault}; save it with {delimiter!r}{tab}", place)
    if twice := sorted({name for name in cells if cells.count(name) > 1}):
        raise DataError(f"names the column {twice[0]!r} twice; each column needs a name of its own", place)
    return [name or "(unnamed)" for name in cells]


def _read_tsv(path: Path, encoding: str) -> Iterator[RawRow]:
    return _read_csv(path, encoding, "\t")


_MOST_ROW_BYTES = 32 * 10**6
_LONGEST_CELL = 2**31 - 1
READERS: Mapping[str, Callable[[Path, str], Iterator[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": lambda path, _: read_parquet(path),
    ".arrow": lambda path, _: read_arrow(path),
    ".txt": _read_text_file,
}
