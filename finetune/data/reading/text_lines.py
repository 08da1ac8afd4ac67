"""Read the lines of text files, plain or compressed, in the encoding that a recipe names."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import AnyStr

import pyarrow

from finetune.data.reading.file_kinds import COMPRESSIONS
from finetune.errors import DataError, Place

UTF8 = "utf-8"
_BLOCK_BYTES = 1 << 20
# Text shrinks to a tenth or so; what unpacks to so many times its size was made to fill a memory or a disk.
_MOST_UNPACKED, _MOST_TIMES = 1 << 28, 200
# The first that fits is most often right; a person sees the text and decides.
_OTHER_ENCODINGS = ("gb18030", "big5", "shift_jis", "euc_kr")
_SHOWN = 16
# The marks of UTF-32 come first, because one of them begins as one of UTF-16.
_MARKS: Mapping[str, tuple[bytes, ...]] = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# Encodings of two and four bytes a character, with the bytes of its unit that are zero where a character is ASCII.
_WIDE: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "utf-32-le": (4, (1, 2, 3)),
    "utf-32-be": (4, (0, 1, 2)),
    "utf-16-le": (2, (1,)),
    "utf-16-be": (2, (0,)),
}
OLD_LINE_ENDS = "its lines end with CR only, as on old Macs; save the file with LF or CRLF as line ends"

NumberedLine = tuple[int, str | DataError]


def read_lines(path: Path, encoding: str = UTF8) -> Iterator[tuple[int, str]]:
    """Yield `(number, line)` without holding the file in memory. Only a newline ends a line, as in an editor.

    Raises:
        DataError: the file cannot be read, or does not have this encoding.
    """
    for number, line in read_lines_or_faults(path, encoding):
        if isinstance(line, DataError):
            raise line
        yield number, line


def read_lines_or_faults(path: Path, encoding: str = UTF8, most: int | None = None) -> Iterator[NumberedLine]:
    """Yield lines as `read_lines` does, but in place of a line that is not UTF-8 the error, so that the next line can be read.

    Raises:
        DataError: the file cannot be read or unpacked, does not have an encoding other than UTF-8, or a line is longer than
            `most` bytes, or letters in other encodings.
    """
    try:
        if codecs.lookup(encoding).name != UTF8:
            yield from enumerate(_split_lines(_decode_blocks(path, encoding), "\n", path, most), 1)
            return
        offset = 0
        blocks = _read_blocks(path)
        first = next(blocks, b"")
        if wide := _find_wide(first):
            raise DataError(
                f"looks like {wide} text without a byte-order mark; set data.encoding: {wide}, or save the file as UTF-8",
                Place(str(path)),
            )
        for number, line in enumerate(_split_lines(itertools.chain([first], blocks), b"\n", path, most), 1):
            yield number, _decode(line, path, number, offset)
            offset += len(line) + 1
    except (pyarrow.ArrowInvalid, OSError, EOFError) as error:
        raise DataError(f"cannot be read ({error})", Place(str(path))) from error


def _read_blocks(path: Path) -> Iterator[bytes]:
    compression = COMPRESSIONS.get(path.suffix.lower())
    packed_bytes, read_bytes = path.stat().st_size, 0
    with pyarrow.input_stream(str(path), compression=compression, buffer_size=_BLOCK_BYTES) as stream:
        while block := stream.read(_BLOCK_BYTES):
            read_bytes += len(block)
            if compression and read_bytes > _MOST_UNPACKED and read_bytes > _MOST_TIMES * packed_bytes:
                fault = f"unpacks to more than {_MOST_TIMES} times its {packed_bytes:,} bytes; unpack it yourself if it is meant so"
                raise DataError(fault, Place(str(path)))
            yield block


def _split_lines(blocks: Iterable[AnyStr], newline: AnyStr, path: Path, most: int | None) -> Iterator[AnyStr]:
    # The pieces of a line that has not ended yet: joining them at its end takes a time that grows with its length only.
    pieces: list[AnyStr] = []
    held = number = 0
    for block in blocks:
        parts = block.split(newline)
        for end in parts[:-1]:
            number += 1
            pieces.append(end)
            yield newline[:0].join(pieces)
            pieces, held = [], 0
        if parts[-1]:
            pieces.append(parts[-1])
            held += len(parts[-1])
        if most is not None and held > most:
            fault = f"is longer than {most // 10**6} MB, which no model can read; split it or remove it"
            raise DataError(fault, Place(str(path), number + 1))
    if pieces:
        yield newline[:0].join(pieces)


def _decode_blocks(path: Path, encoding: str) -> Iterator[str]:
    decoder, lines, is_first = codecs.getincrementaldecoder(encoding)(), 0, True
    for block in itertools.chain(_read_blocks(path), [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            lines += error.object[: error.start].decode(encoding, "replace").count("\n")
            fault = f"is no {encoding} text, which data.encoding names ({error.reason}); name the file's own encoding"
            raise DataError(fault, Place(str(path), lines + 1)) from error
        lines += text.count("\n")
        yield text.removeprefix("\ufeff") if is_first else text
        is_first = False


def _find_wide(head: bytes) -> str | None:
    """Return the encoding of several bytes a character that a text without a mark has, by the zero bytes of its first two.

    A row begins with two ASCII characters, and so does nearly every other text. In UTF-8 a zero byte is no part of a text.
    """
    for name, (size, zeros) in _WIDE.items():
        units = head[: 2 * size]
        has_zeros = all((byte == 0) == (place % size in zeros) for place, byte in enumerate(units))
        if len(units) == 2 * size and has_zeros and _fits(head, name):
            return name
    return None


def ends_as_on_old_macs(line: str) -> bool:
    """Tell whether what was read as one line holds several that end with a carriage return alone."""
    return "\r" in line.rstrip("\r\n")


def _decode(line: bytes, path: Path, number: int, offset: int) -> str | DataError:
    try:
        return line.decode("utf-8-sig" if number == 1 else UTF8)
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {offset + error.start}); {_propose_encoding(path, error.start, line)}"
        return DataError(fault, Place(str(path), number))


def _propose_encoding(path: Path, start: int, line: bytes) -> str:
    """Return what to do about a line that is not UTF-8: name the encodings in which the beginning of the file can be read."""
    shown = {name: _show(line, start, name) for name in _list_encodings(path)}
    found = {name: text for name, text in shown.items() if text and "\ufffd" not in text}
    if not found:
        return "save the file as UTF-8"
    readings = " and ".join(f"{text!r} in {name}" for name, text in found.items())
    name = next(iter(found)) if len(found) == 1 else "to the one in which it reads right"
    return f"it reads {readings}: set data.encoding{':' if len(found) == 1 else ''} {name}, or save the file as UTF-8"


def _show(line: bytes, start: int, encoding: str) -> str:
    """Return a few letters of a line around the byte at `start`."""
    before = len(line[:start].decode(encoding, "replace"))
    text = line.decode(encoding, "replace").replace("\x00", "").strip("\ufeff\r")
    begin = max(0, before - _SHOWN // 2)
    return text[begin : begin + _SHOWN].strip()


@lru_cache(maxsize=8)
def _list_encodings(path: Path) -> tuple[str, ...]:
    """Return the encodings in which the beginning of a file can be read whole, or none where most of it is UTF-8."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    with pyarrow.input_stream(str(path), compression=compression) as stream:
        head = stream.read(_BLOCK_BYTES)
    if marked := next((name for name, marks in _MARKS.items() if head.startswith(marks)), None):
        return (marked,)
    lost = head.decode(UTF8, "replace")
    if lost.count("\ufffd") < sum(not character.isascii() for character in lost) / 2:
        return ()  # a few bytes are wrong in a file that is UTF-8
    fitting = tuple(name for name in _OTHER_ENCODINGS if _fits(head, name))
    return fitting or (("cp1252",) if _fits(head, "cp1252") else ())


def _fits(head: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True
