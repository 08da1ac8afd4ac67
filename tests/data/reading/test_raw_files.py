"""The kinds of files that have a reader, and what Python reads from JSON and no row may hold: numbers that are not finite."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.lint.row_writer import RowWriter
from finetune.data.reading.file_kinds import COMPRESSIONS, KINDS, has_known_ending
from finetune.data.reading.raw_files import READERS, read_file
from finetune.errors import DataError

ROW = '{"prompt": "Q", "completion": "A", "score": %s}'
FAULT = "holds a number that is no JSON, such as NaN or Infinity; write null, another number or a text"


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "-Infinity", '[1, {"a": 1e999}]'])
def test_a_row_with_a_number_that_is_not_finite_cannot_be_read_and_the_next_one_can(tmp_path, number):
    """`1e400` was read as infinite, and written as `Infinity` by `finetune clean`."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([ROW % number, ROW % "1e300"]), encoding="utf-8")
    (_, refused), (_, good) = read_file(path)
    assert isinstance(refused, DataError) and refused.fault == FAULT
    assert good["score"] == 1e300
    path = tmp_path / "rows.json"
    path.write_text(f"[\n{ROW % 1},\n{ROW % number}\n]", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json, line 3: holds a number that is no JSON"):
        list(read_file(path))


def test_the_nan_of_a_parquet_file_is_written_as_null(tmp_path):
    """Parquet files mark a missing number so; it was written as `NaN`, which other programs refuse."""
    rows = pyarrow.table({"text": ["a", "b"], "score": [float("nan"), 0.5]})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    writer = RowWriter(tmp_path)
    for _, row in read_file(tmp_path / "rows.parquet"):
        writer.write("train", "rows.parquet", row)
    writer.close()
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "a", "score": None}, {"text": "b", "score": 0.5}]
    assert "NaN" not in lines[0]


def test_every_kind_has_a_reader_and_every_reader_a_kind(tmp_path):
    assert tuple(READERS) == KINDS
    assert all(has_known_ending(tmp_path / f"rows{kind}{packed}") for kind in KINDS for packed in ("", *COMPRESSIONS))
    assert not has_known_ending(tmp_path / "rows.jsonl.bak")
