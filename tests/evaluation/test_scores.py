"""Prompts, extraction and figures are those of lm-evaluation-harness 0.4.13 and of LLMBox, case by case."""

import hashlib
import math
import re

import pytest
from reference import (
    HALF_MEMORISED,
    REFERENCE,
    SHARED,
    needs_data,
    needs_reference,
    read_lines,
    read_reference,
    take_exemplars,
)
from transformers import AutoTokenizer

from finetune.evaluation.tasks.rules import gsm8k, humaneval, lambada
from finetune.evaluation.tasks.task_forms import Tools, average, average_in_percent, perplexity
from finetune.evaluation.tasks.task_names import TASKS
from finetune.evaluation.tasks.task_table import FORMS


@pytest.fixture(scope="module")
def tools():
    return Tools(AutoTokenizer.from_pretrained(HALF_MEMORISED), None)


@needs_reference
def test_both_filters_of_the_harness_extract_the_same():
    cases = read_reference("harness/gsm8k_extraction.json")
    found = [(gsm8k.extract_strict(c["output"]), gsm8k.extract_flexible(c["output"])) for c in cases["extraction"]]
    assert len(found) == 81
    assert found == [(c["strict-match"], c["flexible-extract"]) for c in cases["extraction"]]
    filters = {"strict-match": gsm8k.extract_strict, "flexible-extract": gsm8k.extract_flexible}
    right = {
        (gold, case["output"], name)
        for gold in cases["golds"]
        for case in cases["extraction"]
        for name, extract in filters.items()
        if gsm8k.is_same_answer(extract(case["output"]), gold)
    }
    assert right == {(match["gold"], match["output"], match["filter"]) for match in cases["matches"]}


@needs_reference
def test_the_authors_extraction_is_the_same(tools):
    numbers = read_reference("authors/gsm8k_extraction.json")
    assert [gsm8k.extract_number(case["output"]) for case in numbers] == [case["extracted"] for case in numbers]
    golds = read_reference("authors/gsm8k_references.json")
    assert [gsm8k.find_reference(case["answer"]) for case in golds] == [case["reference"] for case in golds]
    codes = read_reference("authors/humaneval_truncation.json")
    assert [humaneval.cut_code(case["output"]) for case in codes] == [case["code"] for case in codes]
    words = read_reference("authors/word_accuracy.json")["cases"]
    taken = [lambada.take_word(case["generated"], case["reference"], tools.tokenizer) for case in words]
    found = [word == case["reference"].strip() for word, case in zip(taken, words, strict=True)]
    assert found == [case["correct"] for case in words]


@needs_reference
@needs_data
def test_few_shots_are_drawn_as_the_harness_draws_them(tools):
    rows = read_lines(REFERENCE / "data" / "gsm8k_eval.jsonl")
    asked = gsm8k.ask_harness(rows, read_lines(SHARED / "data" / "gsm8k_train.jsonl"), tools)
    expected = [line["prompt"] for line in read_lines(REFERENCE / "harness" / "gsm8k_prompts.jsonl")]
    assert [question.prompt for question in asked] == expected


@needs_reference
@pytest.mark.parametrize(("name", "most"), [("7_shots_limit_3500_nano_tokenizer", 3500), ("7_shots_no_limit", 100_000)])
def test_the_authors_prompts_are_the_same(tools, name, most):
    rows = read_reference("authors/prompts.json")["gsm8k"][name]["rows"]
    before = gsm8k.join_shots(take_exemplars(), 7, most, tools)
    bare = read_reference("authors/prompts.json")["gsm8k"]["0_shots"]["rows"]
    assert [before + row["prompt"] for row in bare] == [row["prompt"] for row in rows]


@needs_reference
@pytest.mark.parametrize(("name", "count"), [("8_shots_no_limit", 8), ("3_shots_no_limit", 3)])
def test_the_order_of_the_authors_shots_follows_their_number(tools, name, count):
    expected = read_reference("authors/prompts.json")["gsm8k"][name]["rows"][0]["prompt"]
    assert expected.startswith(gsm8k.join_shots(take_exemplars(), count, 100_000, tools))


@needs_reference
def test_the_authors_prompts_of_words_and_code_are_the_same(tools):
    prompts = read_reference("authors/prompts.json")
    passages = read_lines(REFERENCE / "data" / "lambada_like.jsonl")
    for row in prompts["lambada"]["rows"]:
        (question,) = lambada.ask_word([passages[row["row"]]], [], tools)
        assert (question.prompt, question.answer) == (row["prompt"], row["reference"])
    tasks = {row["task_id"]: row for row in read_lines(REFERENCE / "data" / "humaneval_eval.jsonl")}
    for row in prompts["humaneval"]["rows"]:
        assert humaneval.ask_authors([tasks[row["task_id"]]], [], tools)[0].prompt == row["prompt"]


@needs_reference
def test_odd_passages_are_divided_as_llmbox_divides_them(tools):
    passages = {row["case"]: row for row in read_lines(REFERENCE / "data" / "lambada_edge.jsonl")}
    for case in read_reference("authors/lambada_edge.json"):
        if "error" not in case:  # LLMBox cannot divide a passage of one word
            (question,) = lambada.ask_word([passages[case["case"]]], [], tools)
            assert question.prompt.endswith(case["prompt_end"])
            assert (len(question.prompt), question.answer) == (case["prompt_characters"], case["reference"])


@needs_reference
@pytest.mark.parametrize("task", ["lambada", "lambada_edge"])
def test_figures_over_samples_are_those_of_the_harness(task):
    reference = read_reference("harness/half_memorised.json")["tasks"][task]
    accuracy = average([float(sample["greedy"]) for sample in reference["samples"]])
    assert accuracy.value == pytest.approx(reference["metric"]["acc"], rel=1e-12)
    assert accuracy.stderr == pytest.approx(reference["stderr"]["acc"], rel=1e-12)
    drawn = perplexity([sample["loglikelihood"] for sample in reference["samples"]])
    assert drawn.value == pytest.approx(reference["metric"]["perplexity"], rel=1e-9)
    assert drawn.stderr == pytest.approx(reference["stderr"]["perplexity"], rel=1e-6)


def test_one_sample_has_no_standard_error():
    assert (average([1.0]).value, average([1.0]).stderr) == (1.0, None)
    assert perplexity([-math.log(8)]).value == pytest.approx(8)
    assert (average_in_percent([1, 0]).value, average_in_percent([1, 0]).stderr) == (50, pytest.approx(50))


@needs_reference
def test_the_prompts_of_code_are_those_of_the_harness(tools):
    rows = read_lines(REFERENCE / "data" / "humaneval_eval.jsonl")
    asked = humaneval.ask_harness(rows, [], tools)
    expected = [
        row["prompt_sha256"] for row in read_reference("harness/half_memorised.json")["tasks"]["humaneval"]["samples"]
    ]
    assert [hashlib.sha256(question.prompt.encode()).hexdigest() for question in asked] == expected


@pytest.mark.parametrize("name", TASKS)
def test_the_rows_of_every_task_are_pinned_to_a_commit(name):
    """LAMBADA's were not: a change on the hub would have changed its scores without a word."""
    assert re.fullmatch("[0-9a-f]{40}", str(TASKS[name].hub.revision))
    assert [form.task for form in FORMS if form.protocol == "harness"].count(name) == 1
