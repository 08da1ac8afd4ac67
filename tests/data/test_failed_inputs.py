"""Inputs that once lost a part of what they hold, from `../shared/cases`: nothing of a row vanishes without a word."""

import pytest
from token_texts import read_text

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.lint.lint_data import lint_data
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError


@pytest.fixture
def cases(shared):
    folder = shared / "cases"
    if not folder.is_dir():
        pytest.skip("the inputs are not there")
    return folder


@pytest.fixture
def load(cases, nano_llama):
    """Return a function that returns the texts of an input's rows, their trained parts, and the notes."""
    tokenizer = load_tokenizer(nano_llama)

    def run(name, **settings):
        settings = DataSettings((Source(cases / name),), max_tokens=4096, **settings)
        splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), 0)
        key = "prompt_ids" if "prompt_ids" in splits.train.column_names else "input_ids"
        texts = [read_text(tokenizer, row[key]) for row in splits.train]
        trained = [tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in splits.train]
        return texts, trained, splits.report.notes

    return run


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("reasoning.jsonl", "message 2 has 'reasoning_content'"),
        ("weight_half.jsonl", "weight of message 2 is 0.5"),
        ("tool_nan.jsonl", "NaN or Infinity"),
    ],
)
def test_rows_that_are_refused(load, name, fault):
    with pytest.raises(DataError, match=f"line 1: .*{fault}"):
        load(f"rows/{name}")


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("lossw.jsonl", "SECOND<|eot_id|>"),
        ("weight0.jsonl", "SECOND<|eot_id|>"),
        (
            "legacy_fc.jsonl",
            'Let me look.\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|eot_id|>',
        ),
        (
            "toolargs_struct.parquet",
            '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|eot_id|>Done.<|eot_id|>',
        ),
        (
            "toolargs_saved",
            '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|eot_id|>Done.<|eot_id|>',
        ),
    ],
)
def test_what_is_trained(load, name, trained):
    texts, found, notes = load(f"rows/{name}")
    assert found[0] == trained
    assert notes == ()
    assert not any("null" in text for text in texts)


def test_a_system_line_beside_messages_is_asked(load):
    assert all("system<|end_header_id|>\n\nTOPSYSTEM Always" in text for text in load("rows/top_system.jsonl")[0])


@pytest.mark.parametrize(
    ("name", "left_out", "rows"),
    [("dsdict", "test/data-00000-of-00001.arrow (split test)", 8), ("ipynb", "(hidden)", 8), ("dscache", "cache-", 8)],
)
def test_of_a_folder_only_what_is_to_be_trained(load, name, left_out, rows):
    texts, _, (note,) = load(f"rows/{name}")
    assert (len(texts), left_out in note) == (rows, True)


@pytest.mark.parametrize("name", ["lint_calls.jsonl", "lint_sys.jsonl"])
def test_lint_keeps_rows_that_differ(cases, nano_llama, name):
    tokenizer = load_tokenizer(nano_llama)
    settings = DataSettings((Source(cases / "rows" / name),))
    report = lint_data(settings, tokenizer, find_template("yulan-mini", tokenizer))
    assert report.passed == report.rows > 1


@pytest.mark.parametrize(
    ("name", "columns", "parts"),
    [
        ("orca.jsonl", {"prompt": "question"}, ["You are a careful zoologist.", "How many legs"]),
        ("orca_prompt.jsonl", {}, ["You are a careful zoologist.", "How many legs"]),
        ("history_prompt.jsonl", {}, ["Hello there.", "Hi, what do you want to know?", "How many legs"]),
        ("lf_alpaca_input.json", {}, ["Answer the question.\nHow many legs"]),
    ],
)
def test_all_of_a_pairs_prompt_is_asked(load, name, columns, parts):
    texts, _, notes = load(f"pairs/{name}", shape="pair", columns=columns)
    assert notes == ()
    assert all([part in text for part in parts] == [True] * len(parts) for text in texts)
