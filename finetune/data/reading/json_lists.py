"""A JSON list of rows, read a row at a time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from finetune.errors import DataError

_DECODER = json.JSONDecoder()
_NO_SPACE = re.compile(r"[ \t\r\n]*")
_BLOCK_CHARACTERS = 1 << 20


class JsonList:
    """Reads a list a row at a time, so that it may be larger than memory."""

    def __init__(self, path: Path, lines: Iterator[tuple[int, str]]) -> None:
        self._path = path
        self._lines = lines
        self._text = ""
        self._place = 0
        self._first_line = 1  # of the text that is held
        self._is_complete = False

    def read(self) -> Iterator[Any]:
        """Yield the rows.

        Raises:
            DataError: the file is empty, broken, or no list.
        """
        if not self._find_sign():
            raise DataError(f"{self._path}: the file is empty")
        if self._find_sign() != "[":
            row = self._read_value()
            hint = "; is it JSON lines? then name it .jsonl" if self._find_sign() else ""
            raise DataError(f"{self._path}: must hold a list of rows; found {type(row).__name__}{hint}")
        self._place += 1
        if self._find_sign() == "]":
            return
        while True:
            yield self._read_value()
            sign = self._find_sign()
            if sign not in (",", "]"):
                self._fail("Expecting ',' delimiter")
            self._place += 1
            if sign == "]":
                break
            if self._find_sign() == "]":
                self._fail("Expecting value")
        if self._find_sign():
            self._fail("Extra data")

    def _find_sign(self) -> str:
        """Return the next character that is no white space, or nothing at the end."""
        while True:
            self._place = _NO_SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text) or not self._read_more():
                return self._text[self._place : self._place + 1]

    def _read_value(self) -> Any:
        self._find_sign()
        while True:
            fault = None
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except RecursionError as error:
                raise DataError(f"{self._path}: is nested too deeply") from error
            except json.JSONDecodeError as error:
                fault = error
            # What ends where the text ends, or breaks off, may go on behind it.
            if fault is None and (end < len(self._text) or self._is_complete):
                self._place = end
                return value
            if fault is not None and self._is_complete:
                self._place = fault.pos
                self._fail(fault.msg)
            # Twice as much each time: a long row is then tried only a few times.
            wanted = 2 * (len(self._text) - self._place)
            while len(self._text) - self._place <= wanted and self._read_more():
                pass

    def _read_more(self) -> bool:
        """Add lines to the text and drop what was read; return False at the end of the file."""
        self._first_line += self._text.count("\n", 0, self._place)
        kept, size = [self._text[self._place :]], 0
        self._place = 0
        for _, line in self._lines:
            kept.append(line + "\n")
            size += len(line) + 1
            if size >= _BLOCK_CHARACTERS:
                break
        else:
            self._is_complete = True
        self._text = "".join(kept)
        return size > 0

    def _fail(self, reason: str) -> NoReturn:
        line = self._first_line + self._text.count("\n", 0, self._place)
        column = self._place - self._text.rfind("\n", 0, self._place)
        raise DataError(f"{self._path}, line {line}: broken JSON ({reason}, column {column})")
