"""From files to findings and back: faults are counted, shared data lints plausibly, and what passes trains."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.dataset import load_splits
from finetune.data.encoding.spellings import list_control_spellings
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.row_formats import FORMATS
from finetune.data.lint.findings import KINDS
from finetune.data.lint.lint_data import lint_data
from finetune.data.lint.lint_reader import read_lint_rows
from finetune.data.reading.raw_files import read_file
from finetune.data.settings import DataSettings, Source
from finetune.errors import OutputError

USER, ANSWER = {"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "Because it is."}


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.fixture
def lint(tokenizer):
    """Return a function that lints files and, with `fixed`, writes what passes."""

    def run(*train, fixed=None, **settings):
        return lint_data(
            DataSettings(train=tuple(map(Source, train)), **settings),
            tokenizer,
            find_template("yulan-mini", tokenizer),
            fixed,
        )

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [USER]}, "role_order"),
        ({"messages": [ANSWER, USER]}, "role_order"),
        ({"messages": [USER, USER, ANSWER]}, "role_order"),
        ({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "role_order"),
        ({"messages": []}, "empty_text"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_text"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "empty_text"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "unreadable"),
        ({"messages": "hello"}, "unreadable"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "unreadable"),
        ({"other": 1}, "unreadable"),
        ({"messages": [USER, {"role": "assistant", "content": "half \ud800 a character"}]}, "unreadable"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_faults_of_the_reader_become_findings(lint, tmp_path, row, kind, position):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "content": "Because of that."}]}]
    rows.insert(position, row)
    report = lint(write(tmp_path / "rows.jsonl", rows))
    assert report.to_json()["counts"] == {kind: 1}
    assert (report.rows, report.passed, report.left_out) == (3, 2, {kind: 1})
    assert report.findings[0].examples[0].line == position + 1
    assert report.findings[0].examples[0].file == str(tmp_path / "rows.jsonl")
    assert report.findings[0].examples[0].text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b""),
        ("rows.json", b'{\n"a": 1}'),
        ("rows.csv", b'prompt,completion\n"a'),
        ("rows.parquet", b"PAR1"),
        ("rows.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:-4]),
        ("rows.pdf", b"text"),
    ],
)
def test_broken_files_are_findings_that_name_the_file(lint, tmp_path, name, content):
    good = write(tmp_path / "good.jsonl", [{"prompt": "Who?", "completion": "All of us."}])
    (tmp_path / name).write_bytes(content)
    report = lint(tmp_path / name, good)
    assert report.to_json()["counts"] == {"unreadable": 1}
    assert report.rows == report.passed + 1
    example = report.findings[0].examples[0]
    assert example.file == str(tmp_path / name)
    # Of the others nothing was read, so nothing follows.
    assert ("; what follows it was not read" in example.text) == (name == "rows.csv")


def test_lines_after_a_broken_one_are_read(lint, tmp_path):
    lines = [b'{"prompt": "Why?", "completion": "Because it is."}', b'{"prompt": ', b'{"a": "\xff"}', b"12"]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*lines, lines[0].replace(b"Why", b"How")]))
    report = lint(tmp_path / "rows.jsonl", fixed=tmp_path / "fixed")
    assert (report.rows, report.passed, report.left_out) == (5, 2, {"unreadable": 3})
    assert [example.line for example in report.findings[0].examples] == [2, 3, 4]
    assert len(read(tmp_path / "fixed" / "rows.jsonl")) == 2


def test_rows_have_the_tokens_that_training_counts(tokenizer, shared):
    path = shared / "data" / "alpaca_en_demo.json"
    settings = DataSettings(train=(Source(path),), max_tokens=100_000, system="Be brief.")
    template = find_template("yulan-mini", tokenizer)
    rows = list(read_lint_rows(settings, tokenizer, template))
    splits = load_splits(settings, tokenizer, template, seed=0)
    assert [str(row.place) for row in rows] == splits.train["origin"]
    assert [row.tokens for row in rows] == [len(token_ids) for token_ids in splits.train["input_ids"]]
    assert sum(row.trained_tokens for row in rows) == splits.report.train.trained_tokens
    assert [row.raw for row in rows] == [raw for _, raw in read_file(path)]


def test_a_row_that_the_template_refuses(tokenizer, tmp_path):
    source = find_template("yulan-mini", tokenizer).source
    refuse = "{% if messages[0].content == 'bad' %}{{ raise_exception('no such talk') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(refuse + source, encoding="utf-8")
    rows = [{"prompt": text, "completion": "Because it is."} for text in ("one", "bad", "two")]
    settings = DataSettings(train=(Source(write(tmp_path / "rows.jsonl", rows)),))
    report = lint_data(settings, tokenizer, find_template(str(tmp_path / "strict.jinja"), tokenizer))
    assert report.left_out == {"unreadable": 1}
    assert report.findings[0].examples[0].line == 2
    assert "no such talk" in report.findings[0].examples[0].text


def test_control_tokens_are_the_tokenizers_own(tokenizer):
    spellings = list_control_spellings(tokenizer)
    assert {"<s>", "</s>", "<pad>", "<|eot_id|>", "<|start_header_id|>"} <= set(spellings)
    assert all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1 for text in spellings)


SHARED_FILES = {
    # file: columns, rows, some findings with their least and most
    "alpaca_en_demo.json": (
        {},
        999,
        {"duplicate": (14, 14), "one_word": (13, 13), "other_language": (0, 0), "mojibake": (0, 0)},
    ),
    "alpaca_zh_demo.json": (
        {},
        1000,
        {"duplicate": (8, 8), "other_language": (14, 14), "mixed_scripts": (7, 7), "mojibake": (0, 0)},
    ),
    "identity.json": (
        {},
        91,
        {"duplicate": (0, 0), "near_duplicate": (1, 1), "other_language": (0, 0), "mixed_scripts": (0, 0)},
    ),
    "gsm8k_train.jsonl": (
        {"prompt": "question", "completion": "answer"},
        7473,
        {"duplicate": (0, 0), "near_duplicate": (0, 0)},
    ),
    "HumanEval.jsonl.gz": (
        {"completion": "canonical_solution"},
        164,
        {"near_duplicate": (1, 1), "other_language": (0, 0)},
    ),
    "kto_en_demo.json": ({}, 300, {"mojibake": (2, 2), "control_token": (1, 1)}),
    "c4_demo.jsonl": ({}, 300, {}),
    "dpo_en_demo.json": ({}, 300, {}),
    "glaive_toolcall_en_demo.json": ({}, 300, {}),
}


@pytest.mark.parametrize("name", SHARED_FILES)
def test_shared_data(lint, shared, tmp_path, name):
    columns, rows, expected = SHARED_FILES[name]
    report = lint(shared / "data" / name, columns=columns, max_tokens=1024, fixed=tmp_path / "fixed")
    found = report.to_json()["counts"]
    assert report.rows == rows == report.passed + sum(report.left_out.values())
    assert set(found) <= set(KINDS)
    for kind, (least, most) in expected.items():
        assert least <= found.get(kind, 0) <= most, kind
    written = [row for path in (tmp_path / "fixed").iterdir() for row in read(path)]
    assert len(written) == report.passed


def test_what_is_written_trains_and_lints_clean(lint, tokenizer, shared, tmp_path):
    """Bad rows of every dropped kind that a file can hold, among real ones."""
    real = json.loads((shared / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))[:300]
    for row in real:
        row["note"] = "kept 保留"
    held_out = write(tmp_path / "held_out.jsonl", real[:20])
    near = {**real[3], "output": real[3]["output"] + " So it is."}
    empty, long = {**real[40], "output": " "}, {**real[41], "output": "and so on " * 600}
    number = {**real[42], "output": 5}
    train = write(tmp_path / "train.jsonl", [*real[10:], near, empty, long, number, real[50], *real[60:63]])
    report = lint(train, evaluation=(Source(held_out),), max_tokens=1024, fixed=tmp_path / "fixed")
    assert sum(report.left_out.values()) == report.rows - report.passed
    found = report.to_json()["counts"]
    assert found["overlap"] == 10
    assert found["near_overlap"] >= 1
    assert found["duplicate"] >= 4
    assert (found["empty_text"], found["unreadable"]) == (1, 1)
    assert found["too_long"] >= 1

    paths = [tmp_path / "fixed" / "train.jsonl", tmp_path / "fixed" / "held_out.jsonl"]
    assert sorted((tmp_path / "fixed").iterdir()) == sorted(paths)
    settings = DataSettings(
        train=(Source(paths[0]),), evaluation=(Source(paths[1]),), max_tokens=1024, overflow="error"
    )
    splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), seed=0)
    assert splits.report.train.rows + splits.report.evaluation.rows == report.passed
    again = lint(paths[0], evaluation=(Source(paths[1]),), max_tokens=1024)
    assert not [finding.kind for finding in again.findings if finding.is_dropped]
    assert again.passed == again.rows == report.passed
    source = read(train)
    assert all(row in source for row in read(paths[0]))


def test_fixed_files_keep_rows_as_they_are(lint, tmp_path):
    row = {
        "id": 7,
        "extra": {"b": [1, None], "a": "ü\u2028你\ud800"},
        "completion": "Because it is.",
        "prompt": "Why so?",
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = write(tmp_path / "one" / "rows.v1.jsonl", [row, row])
    second = tmp_path / "two" / "rows.v1.jsonl.gz"
    second.write_bytes(gzip.compress(json.dumps({**row, "prompt": "How so?"}).encode()))
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Who?"], "completion": ["It was I."]}), table)
    csv = tmp_path / "only_bad.csv"
    csv.write_text("prompt,completion\nWhy?,\n", encoding="utf-8")
    lint(first, second, table, csv, fixed=tmp_path / "fixed")
    assert {path.name: read(path) for path in (tmp_path / "fixed").iterdir()} == {
        "rows.v1.jsonl": [row],
        "rows.v1-2.jsonl": [{**row, "prompt": "How so?"}],
        "table.jsonl": [{"prompt": "Who?", "completion": "It was I."}],
    }
    assert list(read(tmp_path / "fixed" / "rows.v1.jsonl")[0]) == list(row)


def test_nothing_is_written_into_a_full_folder_or_after_an_error(lint, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Why so?", "completion": "Because it is."}])
    with pytest.raises(OutputError, match="is not empty"):
        lint(path, fixed=tmp_path)
    monkeypatch.setattr("finetune.data.lint.lint_pass.describe_mojibake", lambda messages, fewest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lint(path, fixed=tmp_path / "fixed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_every_format_lints(lint, tmp_path):
    rows = {
        "messages": {"messages": [USER, ANSWER]},
        "alpaca": {"instruction": "Why so?", "output": "Because it is."},
        "prompt_completion": {"prompt": "Why so?", "completion": "Because it is."},
    }
    for name in rows.keys() & FORMATS.keys():
        report = lint(write(tmp_path / f"{name}.jsonl", [rows[name]]))
        assert (report.rows, report.findings) == (1, [])
