"""Packed rows against a list built by hand."""

import pytest
from datasets import Dataset

from finetune.data.packing import PackedRows

DOCUMENTS = Dataset.from_dict(
    {
        "input_ids": [[1, 10, 11, 2], [1, 20, 2], [1, 30, 31, 32, 33, 2]],
        "labels": [[-100, 10, 11, 2], [-100, 20, 2], [-100, 30, -100, 32, 33, 2]],
    }
)


def read(rows):
    return [{name: values.tolist() for name, values in rows[number].items()} for number in range(len(rows))]


def test_documents_follow_one_another_and_go_on_in_the_next_row():
    assert read(PackedRows(DOCUMENTS, 5, 9)) == [
        {"input_ids": [1, 10, 11, 2, 1], "position_ids": [0, 1, 2, 3, 0], "labels": [-100, 10, 11, 2, -100]},
        {"input_ids": [20, 2, 1, 30, 31], "position_ids": [0, 1, 0, 1, 2], "labels": [-100, 2, -100, 30, -100]},
    ]


def test_the_last_row_is_padded_where_it_is_kept():
    rows = read(PackedRows(DOCUMENTS, 5, 9, keeps_last=True))
    assert len(rows) == 3
    assert rows[2] == {
        "input_ids": [32, 33, 2, 9, 9],
        "position_ids": [0, 1, 2, 0, 1],
        "labels": [-100, 33, 2, -100, -100],
    }


def test_a_little_text_is_one_padded_row():
    (row,) = read(PackedRows(DOCUMENTS.select([1]), 6, 9))
    assert row == {
        "input_ids": [1, 20, 2, 9, 9, 9],
        "position_ids": [0, 1, 2, 0, 1, 2],
        "labels": [-100, 20, 2, -100, -100, -100],
    }


@pytest.mark.parametrize("length", [2, 3, 13])
def test_no_token_is_lost_or_doubled(length):
    rows = read(PackedRows(DOCUMENTS, length, 9, keeps_last=True))
    tokens = [token for row in rows for token in row["input_ids"]]
    assert tokens[:13] == [token for document in DOCUMENTS["input_ids"] for token in document]
    assert set(tokens[13:]) <= {9}
