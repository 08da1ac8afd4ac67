"""What Arrow adds to a row is not trained, and JSON that the datasets library stores as text is read."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Json, List, Value

from finetune.data.formats.row_formats import FORMATS, read_row
from finetune.data.reading.arrow_rows import list_rows
from finetune.data.reading.data_folders import list_files
from finetune.data.reading.raw_files import read_file
from finetune.errors import DataError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def make_row(name, arguments, properties):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    result = {"role": "tool", "content": "ok"}
    return {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result, ANSWER],
        "tools": [tool],
    }


ROWS = [
    make_row("weather", {"city": "Oslo"}, {"city": {"type": "string", "enum": ["Oslo", None]}}),
    make_row("calc", {"expr": "1+1"}, {"expr": {"type": "number", "minimum": 0}}),
    make_row("deep", {"place": {"x": 1}, "list": [{"y": 2}, {"z": 3}]}, {"place": {"type": "object"}}),
]


def write_parquet(table, folder):
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def write_stream(table, folder):
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def write_file(table, folder):
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


@pytest.mark.parametrize("write", [write_parquet, write_stream, write_file])
def test_padding_is_no_part_of_a_row(tmp_path, write):
    path = write(pyarrow.Table.from_pylist(ROWS), tmp_path)
    assert [row for _, row in read_file(path)] == ROWS


def test_a_column_without_a_value_stays():
    table = pyarrow.Table.from_pylist([{"prompt": "Q", "answer": None}, {"prompt": "Q", "answer": "A"}])
    assert list_rows(table, "f") == [{"prompt": "Q", "answer": None}, {"prompt": "Q", "answer": "A"}]


def test_a_map_is_an_object():
    kind = pyarrow.schema([("arguments", pyarrow.map_(pyarrow.string(), pyarrow.int64()))])
    assert list_rows(pyarrow.Table.from_pylist([{"arguments": [("a", 1)]}], kind), "f") == [{"arguments": {"a": 1}}]


MESSAGES = List(Json())
ARGUMENTS = List(
    {
        "role": Value("string"),
        "content": Value("string"),
        "tool_calls": List({"type": Value("string"), "function": {"name": Value("string"), "arguments": Json()}}),
    }
)


@pytest.mark.parametrize("messages", [MESSAGES, ARGUMENTS], ids=["messages", "arguments"])
@pytest.mark.parametrize("form", ["saved", "parquet", "parquet without types"])
def test_stored_json_is_read(tmp_path, messages, form):
    rows = [*ROWS, make_row("null", {"city": None}, {})]
    dataset = Dataset.from_list(rows, Features({"messages": messages, "tools": List(Json())}))
    if form == "saved":
        dataset.save_to_disk(tmp_path)
    else:
        write_parquet(dataset.data.table if form == "parquet" else strip_types(dataset.data.table), tmp_path)
    (path,) = list_files(tmp_path)
    read = [read_row(FORMATS["messages"], {}, row, place) for place, row in read_file(path)]
    assert read == [read_row(FORMATS["messages"], {}, row, None) for row in rows]


def strip_types(table):
    """Return a table whose JSON is plain text by its Arrow types, as older libraries write it; its metadata still tells."""

    def strip(kind):
        if isinstance(kind, pyarrow.BaseExtensionType):
            return kind.storage_type
        if pyarrow.types.is_list(kind):
            return pyarrow.list_(strip(kind.value_type))
        return pyarrow.struct([(f.name, strip(f.type)) for f in kind]) if pyarrow.types.is_struct(kind) else kind

    fields = [(field.name, strip(field.type)) for field in table.schema]
    return pyarrow.Table.from_pylist(table.to_pylist(), pyarrow.schema(fields, metadata=table.schema.metadata))


def test_stored_json_that_is_none_is_refused():
    table = pyarrow.table({"messages": pyarrow.array(["{"], pyarrow.string())})
    features = {"info": {"features": {"messages": {"_type": "Json"}}}}
    with pytest.raises(DataError, match="f: holds a value that is stored as JSON and is none"):
        list_rows(table.replace_schema_metadata({"huggingface": json.dumps(features)}), "f")
