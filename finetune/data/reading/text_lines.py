"""Read the lines of text files, plain or compressed, in the encoding that a recipe names."""

import codecs
import itertools
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow

from finetune.errors import DataError, Place

UTF8 = "utf-8"
COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_BYTES = 1 << 20
# Text shrinks to a tenth or so; what unpacks to so many times its size was made to fill a memory or a disk.
_MOST_UNPACKED, _MOST_TIMES = 1 << 28, 200
_BLANKS = b"\xef\xbb\xbf \t\r"
# The first that fits is most often right; a person sees the text and decides.
_OTHER_ENCODINGS = ("gb18030", "big5", "shift_jis", "euc_kr")
_SHOWN = 16

NumberedLine = tuple[int, str | DataError]


def read_lines(path: Path, encoding: str = UTF8) -> Iterator[tuple[int, str]]:
    """Yield `(number, line)` without holding the file in memory. Only a newline ends a line, as in an editor.

    Raises:
        DataError: the file cannot be read or unpacked, or does not have this encoding.
    """
    for number, line in read_lines_or_faults(path, encoding):
        if isinstance(line, DataError):
            raise line
        yield number, line


def read_lines_or_faults(path: Path, encoding: str = UTF8, most_bytes: int | None = None) -> Iterator[NumberedLine]:
    """Yield lines as `read_lines` does, but in place of a line that is not UTF-8 the error, so that the next line can be read.

    Raises:
        DataError: the file cannot be read or unpacked, does not have an encoding other than UTF-8, or a line is longer than
            `most_bytes` and does not begin a list, which may hold all rows in one line.
    """
    try:
        compression = COMPRESSIONS.get(path.suffix.lower())
        with pyarrow.input_stream(str(path), compression=compression, buffer_size=_BLOCK_BYTES) as stream:
            is_utf8 = codecs.lookup(encoding).name == UTF8
            blocks = _read_blocks(stream, path, is_packed=compression is not None)
            yield from _split_utf8(blocks, path, most_bytes) if is_utf8 else _split_decoded(blocks, path, encoding)
    except (pyarrow.ArrowInvalid, OSError, EOFError) as error:
        raise DataError(f"cannot be read ({error})", Place(str(path))) from error


def _read_blocks(stream: Any, path: Path, is_packed: bool) -> Iterator[bytes]:
    packed_bytes, read_bytes = path.stat().st_size, 0
    while block := stream.read(_BLOCK_BYTES):
        read_bytes += len(block)
        if is_packed and read_bytes > _MOST_UNPACKED and read_bytes > _MOST_TIMES * packed_bytes:
            fault = f"unpacks to more than {_MOST_TIMES} times its {packed_bytes:,} bytes; unpack it yourself if it is meant so"
            raise DataError(fault, Place(str(path)))
        yield block


def _split_utf8(blocks: Iterator[bytes], path: Path, most_bytes: int | None) -> Iterator[NumberedLine]:
    # The pieces of a line that has not ended yet: joining them at its end takes a time that grows with its length only.
    pieces: list[bytes] = []
    held_bytes = number = offset = 0
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            line = b"".join([*pieces, end])
            number += 1
            yield number, _decode(line, path, number, offset)
            offset += len(line) + 1
            pieces, held_bytes = [], 0
        if rest:
            pieces.append(rest)
            held_bytes += len(rest)
        if most_bytes is not None and held_bytes > most_bytes and not pieces[0].lstrip(_BLANKS).startswith(b"["):
            fault = f"is longer than {most_bytes // 10**6} MB, which no model can read; split it or remove it"
            raise DataError(fault, Place(str(path), number + 1))
    if pieces:
        yield number + 1, _decode(b"".join(pieces), path, number + 1, offset)


def _decode(line: bytes, path: Path, number: int, offset: int) -> str | DataError:
    try:
        return line.decode("utf-8-sig" if number == 1 else UTF8)
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {offset + error.start}); {_propose_encoding(path, error.start, line)}"
        return DataError(fault, Place(str(path), number))


def _split_decoded(blocks: Iterator[bytes], path: Path, encoding: str) -> Iterator[NumberedLine]:
    decoder, rest, number = codecs.getincrementaldecoder(encoding)(), "", 0
    for block in itertools.chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            number += rest.count("\n") + error.object[: error.start].decode(encoding, "replace").count("\n") + 1
            fault = f"is no {encoding} text, which data.encoding names ({error.reason}); name the file's own encoding"
            raise DataError(fault, Place(str(path), number)) from error
        if not number:
            text = text.removeprefix("\ufeff")
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            number += 1
            yield number, line
    if rest:
        yield number + 1, rest


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
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ("utf-16",)
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
