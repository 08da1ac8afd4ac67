"""Every row format by an exact reading, and every kind of file that rows come in."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.formats.row_formats import choose_format, read_row
from finetune.data.formats.rows import Row, as_prompt
from finetune.data.reading.data_folders import list_files
from finetune.data.reading.raw_files import read_file
from finetune.errors import DataError, Place

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
WORSE = {"role": "assistant", "content": "B"}
TOOL = {"name": "add", "parameters": {}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("messages", {"messages": [USER, ANSWER]}, Row([USER, ANSWER])),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
            Row([USER, ANSWER]),
        ),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
            Row([USER, {**ANSWER, "train": False}, USER, ANSWER]),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            Row([{"role": "system", "content": "S"}, USER, ANSWER]),
        ),
        (
            "alpaca",
            {"instruction": "Q", "input": "I", "output": "A", "history": [["Q", "A"]]},
            Row([USER, ANSWER, {"role": "user", "content": "Q\nI"}, ANSWER]),
        ),
        ("prompt_completion", {"prompt": "Q", "completion": "A"}, Row([USER, ANSWER])),
        ("text", {"text": "T"}, Row(text="T")),
        ("prompt", {"prompt": "Q"}, Row([USER])),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}, Row([USER], [ANSWER], [WORSE])),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, Row([USER], [ANSWER], [WORSE])),
        (
            "sharegpt_preference",
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            Row([USER], [ANSWER], [WORSE]),
        ),
        ("labelled", {"prompt": "Q", "completion": "A", "label": False}, Row([USER, ANSWER], label=False)),
        ("labelled_messages", {"messages": [USER, ANSWER], "label": True}, Row([USER, ANSWER], label=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats_are_found_and_read(name, raw, expected):
    entry = choose_format("auto", {}, raw, Place("f", 1))
    assert entry.name == name
    assert read_row(entry, {}, raw, Place("f", 1)) == expected


def test_sharegpt_tool_calls_become_openai_ones():
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "A"},
    ]
    raw = {"conversations": turns, "tools": json.dumps([TOOL])}
    row = read_row(choose_format("auto", {}, raw, Place("w")), {}, raw, Place("w"))
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = row.messages[1]["tool_calls"]
    assert call.get("function", call) == {"name": "add", "arguments": {"a": 1}}
    assert row.tools[0].get("function", row.tools[0]) == TOOL


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"messages": [USER, USER]}, "turns must alternate"),
        ({"messages": [USER]}, "the conversation ends with"),
        ({"messages": [{"role": "usr", "content": "Q"}, ANSWER]}, "did you mean 'user'"),
        ({"conversations": [{"from": "robot", "value": "Q"}]}, "'robot'; expected"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected: "),
        ({"text": ""}, "text is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "only text parts"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half a character"),
        ({"messages": [{**CALL, "role": "user"}, ANSWER]}, "only the assistant calls tools"),
    ],
)
def test_faulty_rows_name_place_and_reason(raw, message):
    with pytest.raises(DataError, match=f"^f, line 7: .*{message}"):
        read_row(choose_format("auto", {}, raw, Place("f", 7)), {}, raw, Place("f", 7))


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("role_order", {"messages": [USER, USER, ANSWER]}),
        ("role_order", {"messages": [USER, SYSTEM, ANSWER]}),
        ("role_order", {"messages": [USER]}),
        ("role_order", {"messages": [SYSTEM]}),
        ("role_order", {"messages": [USER, CALL, USER]}),
        ("role_order", {"chosen": [USER, ANSWER], "rejected": [USER]}),
        ("empty_text", {"messages": []}),
        ("empty_text", {"messages": [{**USER, "content": " "}, ANSWER]}),
        ("empty_text", {"text": "\n"}),
        ("empty_text", {"prompt": "Q", "completion": ""}),
        ("unreadable", {"messages": [{**USER, "content": "turns must alternate"}, {**ANSWER, "content": None}]}),
        ("unreadable", {"messages": [{"role": "is empty", "content": "Q"}, ANSWER]}),
        ("unreadable", {"messages": "text"}),
        ("unreadable", {"messages": [USER, {**ANSWER, "content": "\ud800"}]}),
        ("unreadable", {"input_ids": [1]}),
    ],
)
def test_the_kind_of_a_fault_does_not_depend_on_its_words(kind, raw):
    place = Place("f", 7)
    with pytest.raises(DataError) as caught:
        read_row(choose_format("auto", {}, raw, place), {}, raw, place)
    assert (caught.value.kind, caught.value.place) == (kind, place)
    assert str(caught.value) == f"f, line 7: {caught.value.fault}"


@pytest.mark.parametrize(
    ("kind", "row"),
    [("role_order", Row([USER, ANSWER, USER, USER])), ("empty_text", Row()), ("unreadable", Row([USER], tools=[TOOL]))],
)
def test_the_kind_of_a_row_that_is_no_prompt(kind, row):
    with pytest.raises(DataError, match=r"^f, line 7: cannot be asked: ") as caught:
        as_prompt(row, Place("f", 7))
    assert caught.value.kind == kind


ROWS = [{"prompt": "Q", "completion": "A"}, {"prompt": "二", "completion": "B"}]


def write_rows(path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\nQ,A\n二,B\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


KINDS = ["a.json", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write_rows(tmp_path / name)
    found = list(read_file(path))
    assert [row for _, row in found] == ROWS
    unit = "row" if name.endswith((".json", ".parquet", ".arrow")) else "line"
    assert [(place.file, place.unit) for place, _ in found] == [(str(path), unit)] * 2
    assert [place.line for place, _ in found] == ([2, 3] if name == "a.csv" else [1, 2])


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert "".join(row["text"] for _, row in read_file(tmp_path / "a.txt")).split() == ["one", "two"]


def test_folders_and_globs_stand_for_their_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        write_rows(tmp_path / name)
    assert [path.name for path in list_files(tmp_path)] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert [path.name for path in list_files(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="matches no file"):
        list_files(tmp_path / "*.parquet")
