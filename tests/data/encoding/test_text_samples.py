"""Rows kept with their texts: encoded anew they give the tokens of training, for every kind of row."""

import json

import pytest
from legacy_tokenizer import write_legacy_tokenizer

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.text_samples import compare_samples, encode_header
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings, Source

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "the user </s>"}]
ROWS = {
    "tools": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one"},
        ],
        "tools": [TOOL],
    },
    "pair": {"prompt": "who", "chosen": "the user", "rejected": "no"},
    "labelled": {"prompt": "who", "completion": "the user", "label": True},
    "text": {"text": "the user writes </s> and goes on " * 20},
    "prompt": {"prompt": "the user asks"},
}
SHORT = {"messages": [*ASKED, {"role": "assistant", "content": "a"}]}
OTHER = {"prompt": "who", "completion": "no", "label": False}


@pytest.fixture
def tokenizer(tmp_path):
    write_legacy_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def load(tmp_path, tokenizer, rows, **settings):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = DataSettings(train=(Source(tmp_path / "rows.jsonl"),), **{"max_tokens": 2048, **settings})
    return load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), seed=0)


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("tools", "sequence", {}),
        ("tools", "sequence", {"max_tokens": 64, "overflow": "truncate", "train_on": "all", "system": "be a user"}),
        ("pair", "sequence", {}),
        ("pair", "pair", {}),
        ("pair", "labelled", {}),
        ("labelled", "labelled", {}),
        ("text", "sequence", {}),
        ("text", "sequence", {"max_tokens": 50, "overflow": "split"}),
        ("prompt", "prompt", {}),
    ],
)
@pytest.mark.parametrize("is_cached", [False, True])
def test_samples_give_the_tokens_of_training(tmp_path, tokenizer, kind, shape, options, is_cached):
    rows = [ROWS[kind]] * 3 + ([OTHER] if kind == "labelled" else [])
    rows += [SHORT] if options.get("overflow") == "truncate" else []
    settings = {"shape": shape, "cache": tmp_path / "cache" if is_cached else None, **options}
    template = find_template("yulan-mini", tokenizer)
    splits = load(tmp_path, tokenizer, rows, **settings)
    if is_cached:
        assert load(tmp_path, tokenizer, rows, **settings).samples == splits.samples
    assert len(splits.samples) == len(rows)
    assert compare_samples(tokenizer, template, splits.samples) is None
    first = splits.samples[0].token_ids[0]
    assert first[: len(splits.train[0]["input_ids"])] == splits.train[0]["input_ids"]
    write_legacy_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": False}))
    if kind in ("pair", "labelled", "prompt"):
        assert compare_samples(load_tokenizer(tmp_path), template, splits.samples).differing == len(rows)


def test_what_cannot_be_compared_is_left_out(tmp_path, tokenizer):
    short, long = SHORT, {"text": "user " * 30_000}
    tokens = {"input_ids": [1, 5, 2]}
    assert len(load(tmp_path, tokenizer, [short] * 40).samples) == 16
    assert load(tmp_path, tokenizer, [long], max_tokens=10**6).samples == ()
    assert load(tmp_path, tokenizer, [tokens] * 3).samples == ()
    longer = {"messages": [*ASKED, {"role": "assistant", "content": "a" * 300}]}
    splits = load(tmp_path, tokenizer, [longer, short, short], max_tokens=200, overflow="drop")
    assert len(splits.samples) == 2


def test_held_out_rows_are_no_samples(tmp_path, tokenizer):
    rows = [{"prompt": f"the {word}", "completion": "a"} for word in ("user", "cat", "dog", "cow")]
    splits = load(tmp_path, tokenizer, rows, held_out=2)
    trained = {tuple(row["input_ids"]) for row in splits.train}
    assert {tuple(sample.token_ids[0]) for sample in splits.samples} == trained


def test_the_header_is_what_stands_before_the_text(tokenizer):
    template = find_template("yulan-mini", tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encode_header(tokenizer, template, "user"))
    assert pieces == ["<s>", "<|start_header_id|>", "▁user", "<|end_header_id|>", "▁", "<0x0A>", "<0x0A>"]
