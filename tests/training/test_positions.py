"""Rows, or prompts with their answers, that are longer than the base checkpoint's positions are said."""

import json

import pytest

from finetune.check.recipes import load_recipe
from finetune.training.training_rows import prepare_rows

LONG = "exceed the 2,048 positions that the base checkpoint was trained for"


@pytest.fixture
def notes(tmp_path, nano_llama):
    """Return a function that returns the notes about rows of so many words, or about prompts."""
    positions = json.loads((nano_llama / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    assert positions == 2048

    def find(words, *overrides, method="sft"):
        row = {"prompt": "How? " + "word " * words, "completion": "So."}
        row = row if method == "sft" else {"prompt": row["prompt"], "answer": "1"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        text = f"method: {method}\nmodel: {{checkpoint: nano}}\ndata: {{train: rows.jsonl, max_tokens: 9000}}\n"
        text += "rewards: {rules: {final_answer: 1}}\n" if method == "grpo" else ""
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return prepare_rows(load_recipe(tmp_path / "r.yaml", overrides))[1].report.notes

    return find


def test_long_rows_are_said(notes):
    (note,) = notes(1000)
    assert LONG in note
    assert "set data.max_tokens: 2048" in note
    assert notes(100) == ()
    assert notes(1000, "model.max_positions=9000") == ()


def test_prompts_count_with_their_answers(notes):
    """Neither prompts nor answers that are too long for the base got a word."""
    for words, answer, is_long in ((1000, 8, True), (100, 2048, True), (100, 8, False)):
        found = notes(words, f"trainer.max_completion_length={answer}", method="grpo")
        assert [LONG in note for note in found] == [True] * is_long


def test_the_shared_input(tmp_path, shared, nano_llama):
    file = shared / "cases" / "pairs" / "grpo_vlong.jsonl"
    if not file.is_file():
        pytest.skip("the input is not there")
    recipe = f"method: grpo\nmodel: {{checkpoint: nano}}\ndata: {{train: {file}, max_tokens: 9000}}\n"
    (tmp_path / "r.yaml").write_text(recipe + "rewards: {rules: {final_answer: 1}}\n", encoding="utf-8")
    assert LONG in prepare_rows(load_recipe(tmp_path / "r.yaml"))[1].report.notes[0]
