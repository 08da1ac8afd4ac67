"""Answers before and after: the same prompts, greedily, as `chat` would answer them, and without a trace in the training."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.models.opening import open_model
from finetune.training.run import run_training


def test_a_run_keeps_its_answers_before_and_after(train, tmp_path, nano_llama):
    run = train("run", "answers=12", "trainer.learning_rate=2e-2")
    samples = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert [sample["origin"] for sample in samples[:2]] == ["fixed", "fixed"]
    assert [sample["origin"] for sample in samples[2:]] == [f"{tmp_path / 'held.jsonl'}, line {n}" for n in (1, 2)]
    rows = [json.loads(line)["messages"] for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    for sample, row in zip(samples[2:], rows, strict=False):
        first = next(number for number, message in enumerate(row) if message["role"] == "assistant")
        assert sample["prompt"].startswith("<s><|start_header_id|>")
        # Tokenizers of SentencePiece's kind show a space between a control token and the text behind it.
        assert sample["prompt"].endswith("assistant<|end_header_id|> \n\n")
        assert row[first - 1]["content"] in sample["prompt"]
        assert row[first]["content"] not in sample["prompt"]
    # The very answers that the start and the result give in a chat, though they were generated in one padded batch.
    question = [{"role": "user", "content": "Who are you? Answer in two sentences."}]
    assert samples[0]["before"] == open_model(str(nano_llama)).answer(question, 12).text.strip()
    assert samples[0]["after"] == open_model(str(run)).answer(question, 12).text.strip()
    assert any(sample["before"] != sample["after"] for sample in samples)
    page = (run / "answers.md").read_text(encoding="utf-8")
    assert page.startswith("# Answers before and after\n\nThe likeliest token each time, at most 12 tokens.")
    assert page.count("before:") == page.count("after:") == len(samples)


def test_answers_change_nothing_of_the_training(train):
    silent = train("silent", "adapter.dropout=0.1")
    asked = train("asked", "adapter.dropout=0.1", "answers=4")
    assert not (silent / "answers.json").exists()
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (silent, asked))
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_a_resumed_run_keeps_what_was_said_before_step_one(train):
    overrides = ["answers=4", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    run = train("run", *overrides)
    samples = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    for path in sorted((run / "adapter").iterdir()):
        path.unlink()
    (run / "adapter").rmdir()
    (run / "answers.md").unlink()
    (run / "answers.json").write_text(json.dumps([{**sample, "after": None} for sample in samples]), encoding="utf-8")
    train("run", *overrides, resume=True)
    assert json.loads((run / "answers.json").read_text(encoding="utf-8")) == samples
    assert (run / "answers.md").is_file()


def test_a_negative_number_of_tokens_is_refused(tmp_path, make_recipe):
    with pytest.raises(RecipeError, match="answers: must be a number of tokens, or 0"):
        load_recipe(tmp_path / "recipe.yaml", ["answers=-1"])


def test_texts_without_prompts_are_asked_the_fixed_questions(make_recipe, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three four five six"}\n' * 8, encoding="utf-8")
    overrides = ["data.train=texts.jsonl", "data.eval=[]", "answers=3", "trainer.max_steps=1"]
    run_training(make_recipe("run", *overrides))
    samples = json.loads((tmp_path / "run" / "answers.json").read_text(encoding="utf-8"))
    assert [sample["origin"] for sample in samples] == ["fixed", "fixed"]
