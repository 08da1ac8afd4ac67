"""Answers before and after: the same prompts, greedily, as `chat` would answer them, and without a trace in the training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.models.opening import open_model
from finetune.runs.run_files import read_metrics
from finetune.training.run import run_training

EVALUATES = [
    "trainer.save_strategy=steps",
    "trainer.save_steps=2",
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=2",
]


def read_answers(run):
    return [json.loads(line) for line in (run / "answers_by_step.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def train_method(make_recipe, make_pairs_recipe):
    """Return a function that trains with dropout and gradient checkpointing, evaluates at steps 2 and 4, and gives the run."""

    def train(name, method, *overrides, resume=False):
        options = [*EVALUATES, "adapter.dropout=0.1", "trainer.gradient_checkpointing=true", *overrides]
        recipe = make_recipe(name, *options) if method == "sft" else make_pairs_recipe(name, method, *options)
        run_training(recipe, resume)
        return recipe.output

    return train


def test_a_run_keeps_its_answers_before_and_after(train, tmp_path, nano_llama):
    run = train("run", "answers=12", "trainer.learning_rate=2e-2", *EVALUATES)
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
    # Between them, the very answers of the checkpoint that was written at the same step.
    middle, last = read_answers(run)
    assert (middle["step"], last["step"]) == (2, 4) and last["answers"] == [sample["after"] for sample in samples]
    assert middle["answers"][0] == open_model(str(run / "checkpoint-2")).answer(question, 12).text.strip()
    assert middle["answers"] != last["answers"]
    page = (run / "answers.md").read_text(encoding="utf-8")
    assert page.startswith("# Answers before and after\n\nThe likeliest token each time, at most 12 tokens.")
    assert page.count("before:") == page.count("after:") == len(samples)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_answers_change_nothing_of_the_training(train_method, method):
    """Dropout draws random numbers, and gradient checkpointing would do without the cache of keys and values."""
    silent = train_method("silent", method)
    asked = train_method("asked", method, "answers=4")
    assert not list(silent.glob("answers*"))
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (silent, asked))
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert [line["loss"] for line in read_metrics(silent) if "loss" in line] == [
        line["loss"] for line in read_metrics(asked) if "loss" in line
    ]
    assert [line["step"] for line in read_answers(asked)] == [2, 4]


def test_a_resumed_run_keeps_what_was_said_before_and_says_the_rest_again(train_method):
    run = train_method("run", "sft", "answers=4")
    samples, lines = json.loads((run / "answers.json").read_text(encoding="utf-8")), read_answers(run)
    for folder in ("adapter", "checkpoint-4"):
        shutil.rmtree(run / folder)
    (run / "answers.md").unlink()
    (run / "answers.json").write_text(json.dumps([{**sample, "after": None} for sample in samples]), encoding="utf-8")
    # The line of step 4 stays from before the kill; step 9 was never reached, and half a line is none.
    with (run / "answers_by_step.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "answers": ["", "", "", ""]}\n{"step": 4, "answ')
    train_method("run", "sft", "answers=4", resume=True)
    assert json.loads((run / "answers.json").read_text(encoding="utf-8")) == samples
    assert read_answers(run) == lines and lines[-1]["answers"] == [sample["after"] for sample in samples]
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
