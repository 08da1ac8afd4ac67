"""Marks of other tools that say what is trained: honoured on messages and on rows, or refused by their value."""

import json

import pytest

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.messages import MARKS
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError

FALSE, TRUE = (False, 0, 0.0, "0", "0.0", "false"), (True, 1, 1.0, "1", "1.0", "True")
QUESTIONS = [{"role": "user", "content": text} for text in ("a", "b")]
FIRST, SECOND = ({"role": "assistant", "content": text} for text in ("FIRST", "SECOND"))


@pytest.fixture
def load(nano_llama, tmp_path):
    """Return a function that returns the trained text of each row and the report."""
    tokenizer = load_tokenizer(nano_llama)

    def run(rows, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = DataSettings((Source(path),), **settings)
        splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), 0)
        labels = [[label for label in row["labels"] if label >= 0] for row in splits.train]
        return [tokenizer.decode(row) for row in labels], splits.report

    return run


def chat(**marks):
    return {"messages": [QUESTIONS[0], {**FIRST, **marks}, QUESTIONS[1], SECOND]}


@pytest.mark.parametrize("key", MARKS)
def test_a_marked_message_is_not_trained(load, key):
    texts, report = load([chat(**{key: value}) for value in (*FALSE, *TRUE)])
    assert texts == ["SECOND<|eot_id|>"] * len(FALSE) + ["FIRST<|eot_id|>SECOND<|eot_id|>"] * len(TRUE)
    assert report.notes == ()


@pytest.mark.parametrize("key", MARKS)
def test_a_marked_row_is_left_out_and_counted(load, key):
    texts, report = load([{**chat(), key: False}, {**chat(), key: True}])
    assert (len(texts), report.left_out, report.notes) == (
        1,
        {"marked as not trained": 1},
        ("1 row is left out: marked as not trained",),
    )


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", [0, 1]])
@pytest.mark.parametrize("key", MARKS)
def test_other_values_are_refused(load, key, value):
    shown = "a list" if isinstance(value, list) else repr(value)
    with pytest.raises(DataError, match=f"line 1: {key} of message 2 is {shown}"):
        load([chat(**{key: value})])
    if key != "loss":
        with pytest.raises(DataError, match=f"line 1: {key} of the row is {shown}"):
            load([{**chat(), key: value}])


def test_a_loss_that_was_measured_is_named(load):
    assert load([{**chat(), "loss": 1.25}])[1].notes == ("keys not used: loss (1 row)",)


def test_marks_that_contradict_each_other_are_refused(load):
    with pytest.raises(DataError, match="train: True and weight: 0"):
        load([chat(train=True, weight=0)])


def test_a_mark_that_asks_to_train_a_question_is_named(load):
    row = {"messages": [{**QUESTIONS[0], "weight": 1}, FIRST]}
    assert load([row])[1].notes == ("keys not used: messages.weight of the user (1 row)",)


@pytest.mark.parametrize("key", ["loss_scale", "train_detail"])
def test_weights_of_other_kinds_are_refused(load, key):
    with pytest.raises(DataError, match=f"message 2 has '{key}'"):
        load([chat(**{key: [0.5]})])


def test_where_all_text_is_trained_a_mark_is_refused(load):
    with pytest.raises(DataError, match=r"marked as not trained, but data.train_on: all"):
        load([chat(train=False)], train_on="all")
    with pytest.raises(DataError, match="marked as not trained, but this method trains each answer"):
        pair = {"chosen": [QUESTIONS[0], {**FIRST, "weight": 0}], "rejected": [QUESTIONS[0], SECOND]}
        load([pair], shape="pair")
