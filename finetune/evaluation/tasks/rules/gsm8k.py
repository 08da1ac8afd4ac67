"""GSM8K: a sum in words, answered in steps.

Source: gsm8k of lm-evaluation-harness 0.4.13; LLMBox at 5a1cfe2 as the authors called it.
"""

import random
import re
from collections.abc import Sequence

import numpy

from finetune.evaluation.asking.generation import Generated
from finetune.evaluation.tasks.task_forms import Question, Row, Sample, Tools
from finetune.evaluation.tasks.task_names import GSM8K_SHOTS

AUTHORS_SHOTS = 7
_HARNESS_SEED, _AUTHORS_SEED = 1234, 2023
# Shots that do not fit into so many tokens are left out whole.
_AUTHORS_TOKENS = 3_500
_INSTRUCTION = "Answer the following question.\n\n"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NO_NUMBER = "[invalid]"
# Removed from both sides before they are compared, in this order.
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_ZEROS = re.compile(r"(?<=\d)\.0*$")


def ask_harness(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Put shots before each question, drawn anew for every row by one generator, so that they depend on the row's place."""
    generator = random.Random(_HARNESS_SEED)
    return [_ask(row, generator.sample(exemplars, GSM8K_SHOTS.count) if exemplars else ()) for row in rows]


def _ask(row: Row, shots: Sequence[Row]) -> Question:
    before = "".join(f"{_state(shot)} {shot['answer']}\n\n" for shot in shots)
    return Question(before + _state(row), f" {row['answer']}")


def _state(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def score_harness(row: Row, found: Sequence[Generated], tools: Tools) -> Sample:
    """Extract a number strictly and flexibly, and compare both with the answer."""
    text = found[0].text
    strict, flexible = extract_strict(text), extract_flexible(text)
    return {
        "generated": text,
        "strict": strict,
        "flexible": flexible,
        "strict_correct": is_same_answer(strict, row["answer"]),
        "flexible_correct": is_same_answer(flexible, row["answer"]),
    }


def extract_strict(text: str) -> str:
    """Return the first number behind `####`."""
    match = _STRICT.search(text)
    return match[1] if match else _NO_NUMBER


def extract_flexible(text: str) -> str:
    """Return the last text that looks like a number."""
    matches = _FLEXIBLE.findall(text)
    return next(part for part in matches[-1] if part) if matches else _NO_NUMBER


def is_same_answer(extracted: str, answer: str) -> bool:
    """Compare without commas, dollars, all up to the last `#### `, a final point, and case."""
    for pattern in _IGNORED:
        extracted, answer = re.sub(pattern, "", extracted), re.sub(pattern, "", answer)
    return extracted.lower() == answer.lower()


def ask_authors(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Put the exemplars before each question, in the authors' order, as many as fit."""
    before = join_shots(exemplars, AUTHORS_SHOTS, _AUTHORS_TOKENS, tools)
    return [Question(f"{before}{_INSTRUCTION}{_state(row)}", f" {row['answer']}") for row in rows]


def join_shots(exemplars: Sequence[Row], count: int, most_tokens: int, tools: Tools) -> str:
    """Return the text of the first `count` exemplars in a seeded order that fit `most_tokens`; all of them keep their order."""
    order = range(len(exemplars))
    if count < len(exemplars):
        order = numpy.random.RandomState(_AUTHORS_SEED).permutation(len(exemplars))[:count].tolist()
    text, tokens = "", 0
    for index in order:
        shot = f"{_INSTRUCTION}{_state(exemplars[index])} {exemplars[index]['answer']}\n\n"
        tokens += len(tools.tokenizer.encode(shot))
        if tokens > most_tokens:
            break
        text += shot
    return text


def score_authors(row: Row, found: Sequence[Generated], tools: Tools) -> Sample:
    """Extract the last number, and compare it with the text behind `####`."""
    text = found[0].text
    extracted, reference = extract_number(text), find_reference(row["answer"])
    return {"generated": text, "extracted": extracted, "reference": reference, "correct": extracted == reference}


def extract_number(text: str) -> str:
    """Return the last number without commas and without a fraction of zeros; the whole text where there is none.

    An integer loses its sign, as it does there.
    """
    text = _COMMA.sub("", text)
    numbers = _NUMBER.findall(text)
    return _ZEROS.sub("", numbers[-1]) if numbers else text


def find_reference(answer: str) -> str:
    """Return the text behind the first `####`, without commas between digits."""
    return _COMMA.sub("", answer.split("####")[1]).strip()
