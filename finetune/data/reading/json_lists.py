"""Read a JSON list one row at a time, so that the file may be larger than memory."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from finetune.data.formats.messages import NO_FINITE_NUMBER
from finetune.errors import DataError, Place

_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_BLOCK_CHARACTERS = 1 << 20
HUGE_NUMBER = "holds a number of more digits than Python reads (4,300); write it as text, or leave it out"


class UnusableJsonError(ValueError):
    """Python reads what no row may hold: the same key twice in an object, or a number that is not finite."""


def _read_finite(text: str) -> float:
    """Return a number, also of one of the words NaN and Infinity, which are no JSON.

    Raises:
        UnusableJsonError: it is not finite, as `1e400`; written again it would be no JSON.
    """
    number = float(text)
    if not math.isfinite(number):
        raise UnusableJsonError(NO_FINITE_NUMBER)
    return number


def _read_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object of its keys and values.

    Raises:
        UnusableJsonError: a key stands twice; Python would keep the last value without a word.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise UnusableJsonError(f"the key {repeated!r} stands twice in an object; only one of the two could be used")
    return row


ROW_DECODER = json.JSONDecoder(object_pairs_hook=_read_once, parse_float=_read_finite, parse_constant=_read_finite)


class JsonList:
    """A JSON file that holds a list of rows. `lines` yields its numbered lines, without their line ends."""

    def __init__(self, path: Path, lines: Iterator[tuple[int, str]]) -> None:
        self._file = str(path)
        self._lines = lines
        # A window of the file: `_position` is the next character in it, `_first_line` the number of its first line.
        self._text = ""
        self._position = 0
        self._first_line = 1
        self._is_complete = False

    def read(self) -> Iterator[Any]:
        """Yield the rows.

        Raises:
            DataError: the file is empty, is broken, or holds no list.
        """
        if not self._peek():
            raise DataError("the file is empty", Place(self._file))
        if self._peek() != "[":
            self._refuse_other_value()
        self._position += 1
        if self._peek() == "]":
            return
        while True:
            yield self._read_value()
            sign = self._peek()
            if sign not in (",", "]"):
                self._fail("Expecting ',' delimiter")
            self._position += 1
            if sign == "]":
                break
            if self._peek() == "]":
                self._fail("Expecting value")
        if self._peek():
            self._fail("Extra data")

    def _refuse_other_value(self) -> NoReturn:
        row = self._read_value()
        lists = [key for key, value in row.items() if isinstance(value, list)] if isinstance(row, dict) else []
        if self._peek():
            hint = " and more after it; write each row into one line, or all rows into one list"
        else:
            hint = f"; its rows may be the list under {lists[0]!r}: write that list alone" if lists else ""
        raise DataError(f"must hold a list of rows; found {type(row).__name__}{hint}", Place(self._file))

    def _peek(self) -> str:
        """Move to the next character that is not white space and return it, or return "" at the end of the file."""
        while True:
            self._position = _WHITE_SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def _read_value(self) -> Any:
        self._peek()
        while True:
            fault = None
            try:
                value, end = ROW_DECODER.raw_decode(self._text, self._position)
            except UnusableJsonError as error:
                raise DataError(str(error), Place(self._file, self._line)) from error
            except RecursionError as error:
                raise DataError("is nested too deeply", Place(self._file)) from error
            except json.JSONDecodeError as error:
                fault = error
            except ValueError as error:
                raise DataError(HUGE_NUMBER, Place(self._file, self._line)) from error
            # A value that reaches the end of the window, or breaks off there, may continue in the next lines.
            if fault is None and (end < len(self._text) or self._is_complete):
                self._position = end
                return value
            if fault is not None and self._is_complete:
                self._position = fault.pos
                self._fail(fault.msg)
            self._double_window()

    def _double_window(self) -> None:
        """Read until twice as much text is held: a long row is then decoded only a few times."""
        wanted = 2 * (len(self._text) - self._position)
        while len(self._text) - self._position <= wanted and self._read_more():
            pass

    def _read_more(self) -> bool:
        """Drop the text that was read and add lines to the rest; return False at the end of the file."""
        self._first_line += self._text.count("\n", 0, self._position)
        kept, size = [self._text[self._position :]], 0
        self._position = 0
        for _, line in self._lines:
            kept.append(line + "\n")
            size += len(line) + 1
            if size >= _BLOCK_CHARACTERS:
                break
        else:
            self._is_complete = True
        self._text = "".join(kept)
        return size > 0

    @property
    def _line(self) -> int:
        return self._first_line + self._text.count("\n", 0, self._position)

    def _fail(self, reason: str) -> NoReturn:
        line = self._line
        column = self._position - self._text.rfind("\n", 0, self._position)
        raise DataError(f"broken JSON ({reason}, column {column})", Place(self._file, line))
