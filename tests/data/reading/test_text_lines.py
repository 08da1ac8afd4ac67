"""Texts that are not UTF-8 lines: what such a file looks like is said, and not only that its JSON is broken."""

import codecs
import gzip
import json

import pytest

from finetune.data.reading.raw_files import read_file
from finetune.errors import DataError

ROWS = [{"prompt": "Wie heißt 北京?", "completion": "Beijing, 首都."}, {"prompt": "Q", "completion": "A"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_wide_text_without_a_mark_is_named_and_can_be_read(tmp_path, encoding, ending):
    """It was "broken JSON (Expecting property name ...)" in each line, and a CSV file had columns with zero bytes in their names."""
    lines = ["prompt,completion", "Q,A"] if ending == ".csv" else LINES
    path = tmp_path / f"rows{ending}"
    content = "\n".join(lines).encode(encoding)
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    with pytest.raises(DataError) as caught:
        list(read_file(path))
    told = f"looks like {encoding} text without a byte-order mark; set data.encoding: {encoding}, or save the file as UTF-8"
    assert caught.value.fault == told
    rows = [row for _, row in read_file(path, encoding)]
    expected = {".csv": [{"prompt": "Q", "completion": "A"}], ".txt": [{"text": "\n".join(LINES)}]}
    assert rows == expected.get(ending, ROWS)


def test_a_mark_names_the_encoding(tmp_path):
    """The mark of UTF-32 begins as that of UTF-16, which was proposed, and does not read the file."""
    for encoding, mark in (("utf-16", codecs.BOM_UTF16_LE), ("utf-32", codecs.BOM_UTF32_LE)):
        path = tmp_path / f"{encoding}.jsonl"
        path.write_bytes(mark + "\n".join(LINES).encode(f"{encoding}-le"))
        _, fault = next(read_file(path))
        assert isinstance(fault, DataError)
        assert f"set data.encoding: {encoding}, or" in fault.fault
        assert [row for _, row in read_file(path, encoding)] == ROWS


@pytest.mark.parametrize("first", [b"\x00", b"{\x00", b"\x00{}"])
def test_single_zero_bytes_are_no_wide_text(tmp_path, first):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(first + b"\n" + LINES[1].encode() + b"\n")
    (_, fault), (_, row) = read_file(path)
    assert isinstance(fault, DataError) and fault.fault.startswith("broken JSON")
    assert row == ROWS[1]


def test_line_ends_of_old_macs_are_named(tmp_path):
    """The message was "broken JSON (Extra data, column 30)", or the csv module's on opening the file in another mode."""
    old = "its lines end with CR only, as on old Macs; save the file with LF or CRLF as line ends"
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\r".join(LINES).encode() + b"\r")
    (_, fault), *_ = read_file(path)
    assert (
        isinstance(fault, DataError) and fault.fault.startswith("broken JSON (Extra data") and fault.fault.endswith(old)
    )
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\rQ,A\r")
    with pytest.raises(DataError) as caught:
        list(read_file(path))
    assert caught.value.fault == old
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"prompt": \r\n')
    (_, fault), *_ = read_file(path)
    assert isinstance(fault, DataError) and "Macs" not in fault.fault
