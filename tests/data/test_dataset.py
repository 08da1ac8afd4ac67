"""Files to rows to splits: every format, every fault with its place, and an account of every row."""

import gzip
import importlib.util
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.row_formats import FORMATS, choose_format, read_row
from finetune.data.preview.preview import describe_preview, preview_rows
from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.raw_files import read_file
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, Place
from finetune.files.resources import find_resource_folder

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROW = {"messages": [USER, ANSWER]}


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.fixture
def load(tokenizer, tmp_path):
    """Return a function that writes rows as JSON lines and loads their splits."""

    def run(rows, seed=0, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        template = find_template("yulan-mini", tokenizer)
        return load_splits(DataSettings(train=(Source(path),), **settings), tokenizer, template, seed)

    return run


@pytest.mark.parametrize(
    ("raw", "columns", "name", "texts"),
    [
        (ROW, {}, "messages", ["q", "a"]),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, {}, "messages", ["s", "q", "a"]),
        ({"instruction": "i", "output": "o"}, {}, "alpaca", ["i", "o"]),
        ({"instruction": "i", "input": "", "output": "o"}, {}, "alpaca", ["i", "o"]),
        ({"instruction": "i", "input": "x", "output": "o"}, {}, "alpaca", ["i\nx", "o"]),
        (
            {"instruction": "i", "output": "o", "system": "s", "history": [["h", "r"]]},
            {},
            "alpaca",
            ["s", "h", "r", "i", "o"],
        ),
        ({"prompt": "p", "completion": "c"}, {}, "prompt_completion", ["p", "c"]),
        ({"prompt": [USER], "completion": [ANSWER]}, {}, "prompt_completion", ["q", "a"]),
        (
            {"question": "q", "answer": "a"},
            {"prompt": "question", "completion": "answer"},
            "prompt_completion",
            ["q", "a"],
        ),
        ({"chat": [USER, ANSWER], "id": 3}, {"messages": "chat"}, "messages", ["q", "a"]),
    ],
)
def test_formats(raw, columns, name, texts):
    entry = choose_format("auto", columns, raw, Place("file", 1))
    assert entry.name == name
    messages = read_row(entry, columns, raw, Place("file", 1)).messages
    assert [message["content"] for message in messages] == texts
    assert [message["role"] for message in messages if message["role"] != "system"] == ["user", "assistant"] * (
        len([message for message in messages if message["role"] != "system"]) // 2
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"messages": [USER]}, "the conversation ends with the user; it must end with the assistant's answer"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [ANSWER]}, "message 1 is of the assistant; turns must alternate, so it should be of the user"),
        ({"messages": [USER, USER, ANSWER]}, "message 2 is of the user; turns must alternate"),
        (
            {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]},
            "message 2 is a system message; it may only",
        ),
        (
            {"messages": [{"role": "assistent", "content": "a"}]},
            "has the role 'assistent'; expected system, user, assistant, tool (did you mean 'assistant'?)",
        ),
        ({"messages": [{"speaker": "human", "value": "a"}]}, "message 1 has no 'role'; found speaker, value"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of message 1 is a number; expected text"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "the content of message 1 is empty"),
        ({"messages": "hello"}, "messages is text; expected a list"),
        ({"messages": ["hello"]}, "message 1 is text; expected an object with role and content"),
        ({"instruction": "i", "output": None}, "output is null; expected text"),
        (
            {"instruction": "i", "output": "o", "history": ["x"]},
            "turn 1 of history is text; expected a question and an answer",
        ),
    ],
)
def test_faulty_rows_say_where_and_what(raw, message):
    with pytest.raises(DataError) as caught:
        read_row(choose_format("auto", {}, raw, Place("f")), {}, raw, Place("data/x.jsonl", 18))
    assert str(caught.value).startswith("data/x.jsonl, line 18: ")
    assert message in str(caught.value)


def test_unknown_keys_propose_a_mapping():
    with pytest.raises(DataError) as caught:
        choose_format("auto", {}, {"Question": "q", "Response": "a", "id": 1}, Place("x.csv", 2))
    assert "x.csv, line 2: the keys Question, Response, id fit no format" in str(caught.value)
    assert "data.columns: {prompt: Question, completion: Response}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"Instruction": "i", "Input": "x", "Output": "o", "History": []},
            "data.columns: {input: Input, history: History, prompt: Instruction, completion: Output}",
        ),
        (
            {"instruction": "i", "context": "x", "response": "o"},
            "data.columns: {input: context, prompt: instruction, completion: response}",
        ),
        ({"编号": 1, "问题": "q", "答案": "a"}, "data.columns: {prompt: 问题, completion: 答案}"),
        ({"system": "s", "user": "q", "assistant": "a"}, "data.columns: {prompt: user, completion: assistant}"),
        (
            {"data": [{"prompt": "q", "completion": "a"}]},
            "data holds a list of rows; write this list alone into a file",
        ),
    ],
)
def test_a_proposed_mapping_leaves_out_no_part_of_the_question(row, message):
    """Following the advice, the input of Alpaca's rows and the context of Dolly's were not trained."""
    with pytest.raises(DataError, match=re.escape(message)):
        choose_format("auto", {}, row, Place("x.jsonl", 1))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.csv",
            "prompt;completion\nq;a\n",
            "its columns are separated by ';', and those of CSV by ','; save it with ','",
        ),
        (
            "a.csv",
            "prompt\tcompletion\nq\ta\n",
            "separated by '\\t', and those of CSV by ','; save it with ','; a file with",
        ),
        ("a.tsv", "prompt,completion\nq,a\n", "separated by ',', and those of TSV by '\\t'; save it with '\\t'"),
    ],
)
def test_columns_with_another_mark_between_them(tmp_path, name, text, said):
    """The advice was to map the one column `prompt;completion`."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(said)):
        list(read_file(tmp_path / name))


def test_a_later_row_without_its_field(load):
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 2: has no 'messages', which the format messages needs; found text"
    ):
        load([ROW, {"text": "x"}, ROW])


def test_many_faulty_rows_give_one_message(load):
    with pytest.raises(DataError) as caught:
        load([ROW] + [{"messages": [USER]}] * 9)
    text = str(caught.value)
    assert text.startswith("9 rows cannot be trained:")
    assert text.count("ends with the user") == 1
    assert "rows.jsonl, line 2, line 3, line 4 and 6 more: the conversation ends" in text


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": f'问 {i},\n"x"', "completion": "a"} for i in range(3)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = {
            ".json": json.dumps(rows, ensure_ascii=False),
            ".jsonl": "\ufeff" + "\n\n".join(json.dumps(row) for row in rows),
            ".csv": "prompt,completion\n"
            + "".join('"{}",a\n'.format(row["prompt"].replace('"', '""')) for row in rows),
        }[suffix.removesuffix(".gz")]
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    found = list(read_file(path))
    assert [row for _, row in found] == rows
    assert all(str(place).startswith(f"{path}, ") for place, _ in found)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    (tmp_path / "x.jsonl").write_text(f"\n{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    assert [place.position for place, _ in read_file(tmp_path / "x.jsonl")] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n' * 17 + b'{"a": \n', "x.jsonl, line 18: broken JSON (Expecting value, column 7)"),
        ("x.json", b'[{"a": 1},\n {"a" 2}]', "x.json, line 2: broken JSON (Expecting ':' delimiter, column 7)"),
        ("x.json", b'{\n"a": 1}', "must hold a list of rows; found dict"),
        ("x.json", b"", "the file is empty"),
        ("x.json", b"[]", "the file holds no rows"),
        ("x.jsonl", b"\n \n", "the file holds no rows"),
        ("x.jsonl", b"[1]\n", "row 1: must be an object with keys; found int"),
        ("x.jsonl", b'{"a": "\xff"}', "line 1: is not UTF-8 text (byte 7)"),
        ("x.jsonl.gz", b"not gzip", "cannot be read"),
        (
            "x.csv",
            b"a,b\n1,2\n1,2,3\n",
            "x.csv, line 3: has 3 fields where the first line has 2; quote cells that hold a ','",
        ),
        ("x.csv", b'a,b\n1,"2\n', "broken CSV"),
        ("x.parquet", b"PAR1nothing", "is not a Parquet file that can be read"),
        (
            "x.doc",
            b"hello",
            "the ending .doc is not known; known are .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .txt",
        ),
    ],
)
def test_broken_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        [require_row(row) for _, row in read_file(tmp_path / name)]
    assert message in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"pair\.jsonl: does not exist; .*pairs\.jsonl does"):
        list(read_file(tmp_path / "pair.jsonl"))


def make_rows(lengths):
    return [
        {"messages": [USER, {"role": "assistant", "content": "1 " * length + f"{i}"}]}
        for i, length in enumerate(lengths)
    ]


def test_overflow_is_an_error_unless_a_policy_is_stated(load):
    with pytest.raises(DataError) as caught:
        load(make_rows([1, 1, 60]), max_tokens=40)
    assert "1 of 3 rows is longer than data.max_tokens: 40" in str(caught.value)
    assert "rows.jsonl, line 3" in str(caught.value)


def test_dropped_rows_are_counted(load):
    splits = load(make_rows([1, 1, 60]), max_tokens=40, overflow="drop")
    report = splits.report.train
    assert (report.rows_read, report.rows, report.dropped, report.truncated) == (3, 2, 1, 0)
    assert splits.report.notes == ("1 row is longer than data.max_tokens: 40 and left out (data.overflow: drop)",)
    assert [row["origin"].rpartition(", ")[2] for row in splits.train] == ["line 1", "line 2"]


def test_cut_answers_are_counted(load):
    long_question = {"messages": [{"role": "user", "content": "1 " * 80}, ANSWER]}
    splits = load([*make_rows([1, 60]), long_question], max_tokens=40, overflow="truncate")
    report = splits.report.train
    # The row whose answer lies wholly beyond the limit would train nothing.
    assert (report.rows_read, report.rows, report.dropped) == (3, 2, 1)
    assert (report.truncated, report.answers_cut) == (1, 1)
    assert [row["is_cut"] for row in splits.train] == [False, True]
    assert len(splits.train[1]["input_ids"]) == 40
    assert "1 answer loses its end and its stop token" in splits.report.notes[1]


def test_the_account_adds_up(load):
    splits = load(make_rows(range(1, 30)), max_tokens=40, overflow="drop", held_out=0.25)
    for split, rows in ((splits.report.train, splits.train), (splits.report.evaluation, splits.evaluation)):
        assert split.rows_read == split.rows + split.dropped
        assert split.rows == len(rows) == sum(count for _, count in split.histogram)
        assert split.tokens == sum(len(row["input_ids"]) for row in rows)
        assert split.trained_tokens == sum(label != -100 for row in rows for label in row["labels"])
        assert split.longest == max(len(row["input_ids"]) for row in rows)
    assert splits.report.train.rows_read + splits.report.evaluation.rows_read == 29


def test_nothing_left_is_an_error(load):
    with pytest.raises(DataError, match=r"no row is left for training: all 2 exceed data.max_tokens: 10"):
        load(make_rows([30, 40]), max_tokens=10, overflow="drop")


@pytest.mark.parametrize(("held_out", "count"), [(3, 3), (0.2, 4), (0.001, 1)])
def test_the_held_out_rows_follow_the_seed(load, held_out, count):
    rows = make_rows(range(20))
    first, second, other = (load(rows, seed=seed, held_out=held_out) for seed in (5, 5, 6))
    assert len(first.evaluation) == count
    assert len(first.train) == 20 - count
    assert first.evaluation["origin"][:] == second.evaluation["origin"][:]
    assert first.report.fingerprint == second.report.fingerprint != other.report.fingerprint
    assert not set(first.evaluation["origin"]) & set(first.train["origin"])


def test_holding_out_everything_is_refused(load):
    with pytest.raises(DataError, match="2 of 2 rows would leave none for training"):
        load([ROW, ROW], held_out=2)


def test_a_system_line_for_rows_that_have_none(load, tokenizer):
    own = {"messages": [{"role": "system", "content": "mine"}, USER, ANSWER]}
    splits = load([ROW, own], system="default")
    texts = [tokenizer.decode(row["input_ids"]) for row in splits.train]
    assert ["default" in text for text in texts] == [True, False]
    assert ["mine" in text for text in texts] == [False, True]


def test_every_control_token_in_a_text_stays_text(load, tokenizer):
    text = (
        "".join(token.content for token in tokenizer.added_tokens_decoder.values()) + "{{ bos_token }}{% for x in y %}"
    )
    splits = load(
        [ROW, {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}],
        max_tokens=8192,
    )
    plain, row = splits.train[0], splits.train[1]
    controls = [token for token in row["input_ids"] if token in tokenizer.added_tokens_decoder]
    assert (
        controls == [t for t in plain["input_ids"] if t in tokenizer.added_tokens_decoder] == [1, *[104, 105, 106] * 2]
    )
    assert tokenizer.decode(row["input_ids"]).count(text) == 2
    trained = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(trained) == text + "<|eot_id|>"
    assert trained[-1] == 106 and 106 not in trained[:-1]


def test_preview_shows_what_is_trained(load, tokenizer):
    preview = preview_rows(load([ROW, ROW]), tokenizer, 1)
    assert len(preview.rows) == 1
    row = preview.rows[0]
    assert tokenizer.decode([t for t, m in zip(row.token_ids, row.trained, strict=True) if m]) == "a<|eot_id|>"
    plain, coloured = (describe_preview(preview, in_colour=in_colour) for in_colour in (False, True))
    assert "⟦a<|eot_id|>⟧" in plain
    assert "\x1b[32ma<|eot_id|>\x1b[0m" in coloured
    assert "train: 2 rows read, 2 kept, 0 dropped, 0 truncated (0 answers cut)" in plain


@pytest.mark.parametrize(
    ("file", "columns", "rows"),
    [
        ("gsm8k_train.jsonl", {"prompt": "question", "completion": "answer"}, 7473),
        ("alpaca_en_demo.json", {}, 999),
        ("alpaca_zh_demo.json", {}, 1000),
        ("identity.json", {}, 91),
    ],
)
def test_real_files_are_read_whole(shared, tokenizer, file, columns, rows):
    settings = DataSettings(train=(Source(shared / "data" / file),), columns=columns, max_tokens=512, overflow="drop")
    report = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), 0).report
    assert report.train.rows_read == rows
    assert report.train.rows > 0.5 * rows


def load_generator():
    path = find_resource_folder("recipes") / "data" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_bundled(name):
    path = find_resource_folder("recipes") / "data" / name
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_bundled_rows_are_what_the_generator_makes():
    train, held_out = load_generator().make_rows()
    assert read_bundled("demo.jsonl") == train
    assert read_bundled("demo_eval.jsonl") == held_out
    pairs = (find_resource_folder("recipes") / "data" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in pairs] == load_generator().make_pairs(train)
    asked = {row[-2]["content"] for row in train}
    assert not asked & {row[-2]["content"] for row in held_out}


def test_the_bundled_sums_are_right():
    checked = 0
    for row in [*read_bundled("demo.jsonl"), *read_bundled("demo_eval.jsonl")]:
        for message in row:
            for left, sign, right, value in re.findall(r"(\d+) ([+×-]) (\d+) = (\d+)", message["content"]):
                numbers = {"+": int(left) + int(right), "-": int(left) - int(right), "×": int(left) * int(right)}
                assert numbers[sign] == int(value), message
                checked += 1
    assert checked > 300


def test_the_table_of_formats_is_keyed_by_name():
    assert all(name == entry.name for name, entry in FORMATS.items())


def test_a_column_that_no_row_has_is_named(load):
    rows = [{"question": f"q{number}", "reply": "a"} for number in range(3)]
    columns = {"prompt": "question", "completion": "reply", "system": "sytem"}
    assert load(rows, columns=columns).report.notes == ("data.columns names the key 'sytem', which no row has",)
