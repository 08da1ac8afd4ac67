"""Where the results of lm-evaluation-harness and LLMBox lie, which the tests of tasks compare with."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared"
REFERENCE = SHARED / "reference" / "evaluation"
HALF_MEMORISED = str(REFERENCE / "models" / "half_memorised")

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference results are not here")
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data is not here")


def read_reference(name):
    return json.loads((REFERENCE / name).read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def take_exemplars():
    """The eight exemplars of LLMBox, from a prompt that holds them all."""
    prompt = read_reference("authors/prompts.json")["gsm8k"]["8_shots_no_limit"]["rows"][0]["prompt"]
    parts = prompt.split("Answer the following question.\n\nQuestion: ")[1:-1]
    pairs = [part.removesuffix("\n\n").split("\nAnswer: ", 1) for part in parts]
    return [{"question": question, "answer": answer} for question, answer in pairs]
