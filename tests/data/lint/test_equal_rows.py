"""Rows are equal where they are asked and trained the same, for lint as for data.deduplicate."""

import json

import pytest

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.lint.lint_data import lint_data
from finetune.data.lint.lint_report import describe_lint
from finetune.data.settings import DataSettings, Source

LONG = "The quick brown fox jumps over the lazy dog while seven wizards brew a pot of strong black tea near the mill."
USER, ANSWER = (
    {"role": "user", "content": f"Look it up. {LONG}"},
    {"role": "assistant", "content": "I am here to help."},
)
SYSTEM = {"role": "system", "content": "You are Ann."}


def call(**arguments):
    return {**ANSWER, "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": arguments}}]}


def tools(name):
    return {"messages": [USER, ANSWER], "tools": [{"name": name, "parameters": {}}]}


DIFFERENT = [
    ({"messages": [USER, call(q="cats")]}, {"messages": [USER, call(q="dogs")]}),
    (tools("search"), tools("find")),
    (tools("search"), {"messages": [USER, ANSWER]}),
    ({"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER]}),
    (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER, USER, ANSWER]},
        {"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
    ),
    ({"messages": [SYSTEM, USER, ANSWER]}, {"messages": [{**SYSTEM, "content": "You are Bob."}, USER, ANSWER]}),
    ({"messages": [USER, ANSWER], "system": "You are Ann."}, {"messages": [USER, ANSWER]}),
]
EQUAL = [
    ({"messages": [USER, ANSWER], "system": "You are Ann."}, {"messages": [SYSTEM, USER, ANSWER], "id": 7}),
    (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
        {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER]},
    ),
    ({"messages": [USER, call(q="cats")]}, {"messages": [USER, call(q="cats")]}),
]


@pytest.fixture
def run(nano_llama, tmp_path):
    """Return a function that lints rows for training and evaluation, and returns the report and the tokenizer's needs."""
    tokenizer = load_tokenizer(nano_llama)
    template = find_template("yulan-mini", tokenizer)

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path)

    def lint(train, evaluation=(), fixed=None, only=None):
        held = (write("held.jsonl", evaluation),) if evaluation else ()
        settings = DataSettings((write("rows.jsonl", train),), evaluation=held, deduplicate=True)
        report = lint_data(settings, tokenizer, template, fixed, only)
        return report, load_splits(settings, tokenizer, template, 0).report if fixed is None else None

    return lint


@pytest.mark.parametrize("pair", DIFFERENT)
def test_rows_that_differ_are_kept(run, pair):
    report, prepared = run(pair)
    assert (report.passed, report.left_out, prepared.left_out) == (2, {}, {})


@pytest.mark.parametrize("pair", EQUAL)
def test_rows_that_are_equal_are_duplicates(run, pair):
    report, prepared = run(pair)
    assert (report.left_out, prepared.left_out) == ({"duplicate": 1}, {"duplicates": 1})


@pytest.mark.parametrize("pair", DIFFERENT)
def test_overlap_in_text_alone_is_reported_and_kept(run, pair):
    report, _ = run(pair[:1], pair[1:])
    assert (report.passed, report.left_out) == (2, {})
    assert report.to_json()["counts"] == {"other_context": 1}


@pytest.mark.parametrize("pair", EQUAL)
def test_overlap_is_left_out(run, pair):
    other = {"messages": [{**USER, "content": "Who wrote it?"}, ANSWER]}
    assert run(pair[:1], [*pair[1:], other])[0].left_out == {"overlap": 1}


def test_answers_that_differ_in_their_calls_are_not_equal(run):
    silent = [{**call(q=word), "content": ""} for word in ("cats", "dogs")]
    pair = {"prompt": "Look it up.", "chosen": silent[:1], "rejected": silent[1:]}
    same = {"prompt": "Look it up.", "chosen": silent[:1], "rejected": silent[:1]}
    report, _ = run([pair, same])
    assert report.left_out == {"equal_answers": 1}


def test_the_report_names_what_is_not_used(run):
    report, prepared = run([{"prompt": "Why so?", "completion": "Because it is.", "id": 1, "source": "x"}])
    assert report.notes == prepared.notes == ("keys not used: id (1 row), source (1 row)",)
    assert report.to_json()["notes"] == report.notes
    assert report.notes[0] in describe_lint(report)


def test_only_the_kinds_that_are_named_are_left_out(run, tmp_path):
    rows = [{"prompt": "Why so?", "completion": text} for text in ("Because it is.", "Because it is.", "Yes", " ")]
    report, _ = run([*rows, {"other": 1}], fixed=tmp_path / "fixed", only=frozenset({"empty_text", "one_word"}))
    assert (report.passed, report.left_out) == (3, {"one_word": 1, "empty_text": 1})
    written = [json.loads(line) for line in (tmp_path / "fixed" / "rows.jsonl").read_text().splitlines()]
    assert written == [rows[0], rows[1], {"other": 1}]
    assert {finding.kind: finding.is_dropped for finding in report.findings} == {
        "unreadable": False,
        "empty_text": True,
        "duplicate": False,
        "one_word": True,
    }
