"""MBPP: the prompt of lm-evaluation-harness 0.4.13, and verdicts that are those of running text and tests together."""

import contextlib
import io
import json

import pytest

from finetune.cli.main import main
from finetune.evaluation.sandbox.programs import find_sandbox, run_program
from finetune.evaluation.tasks.rules.mbpp import ask, choose_shots, find_function, make_program

ROW = {
    "task_id": 11,
    "text": "Write a function to find the area of a circle.",
    "code": "import math\ndef circle(r):\r\n    return math.pi * r * r",
    "test_list": ["assert math.isclose(circle(1), 3.1416, rel_tol=0.01)", "assert circle(0) == 0", "assert round(circle(2)) == 13", "assert circle(1) == 7"],
}  # fmt: skip
WORDS = {
    "task_id": 12,
    "text": "Write a function to find shared letters.",
    "code": "",
    "test_list": ["assert set(shared('ab', 'bc')) == set(['b'])", "assert shared('', 'a') == []", "assert shared('é', 'é') == ['é']"],
}  # fmt: skip
SUMS = {
    "task_id": 126,
    "text": "Write a function to find the sum of common divisors.",
    "code": "def sum(a, b):\n    return __builtins__['sum'](n for n in range(1, min(a, b)) if a % n == b % n == 0)",
    "test_list": ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93", "assert sum(4, 6) == 3"],
}  # fmt: skip
# As lm-evaluation-harness builds it: each shot is its description, its code and the end, and an empty line.
SHOT = (
    "You are an expert Python programmer, and here is your task: Say {0}. Your code should pass these tests:\n\n"
    "assert say() == {0}\nassert True\nassert 1\n[BEGIN]\ndef say():\r\n    return {0}\n[DONE]\n\n"
)
ASKED = (
    "You are an expert Python programmer, and here is your task: Write a function to find the area of a circle. Your code should pass "
    "these tests:\n\nassert math.isclose(circle(1), 3.1416, rel_tol=0.01)\nassert circle(0) == 0\nassert round(circle(2)) == 13\n[BEGIN]\n"
)


def make_shot(number):
    tests = [f"assert say() == {number}", "assert True", "assert 1", "assert 2"]
    return {
        "task_id": number,
        "text": f"Say {number}.",
        "code": f"def say():\r\n    return {number}",
        "test_list": tests,
    }


def test_the_prompt_is_that_of_the_harness():
    shots = [make_shot(number) for number in (1, 4, 3, 2)]
    (question,) = ask([ROW], shots, None)
    assert question.prompt == "".join(SHOT.format(number) for number in (2, 3, 4)) + ASKED
    assert question.answer == f"{ROW['code']}\n[DONE]"
    assert choose_shots([make_shot(number) for number in (7, 8, 9, 10)]) == [make_shot(number) for number in (7, 8, 9)]


def test_the_function_is_found_in_the_tests():
    assert find_function("\n".join(ROW["test_list"])) == "circle"
    assert find_function("\n".join(WORDS["test_list"])) == "shared"
    assert find_function("assert len([1]) == 1") == ""
    # MBPP defines some names that Python has: its `sum` was not called, but Python's.
    assert find_function("assert len(set(sum(10, 15))) == 1", "no code:", "def sum(a, b): return [a]") == "sum"
    assert find_function("assert set(shared('ab', 'bc')) == 1", "def set(a): pass\ndef shared(a, b): pass") == "shared"


COMPLETIONS = {
    "right": (ROW, ROW["code"]),
    "right words": (WORDS, "def helper(a):\n    return set(a)\ndef shared(a, b):\n    return sorted(helper(a) & helper(b))"),
    "right, by the name of a built-in function": (SUMS, SUMS["code"]),
    "wrong, by the name of a built-in function": (SUMS, "def sum(a, b):\n    return 6"),
    "wrong": (ROW, "import math\ndef circle(r):\n    return r"),
    "the module is not imported": (ROW, "def circle(r):\n    return 3.14159 * r * r"),
    "no code": (ROW, "Here is the function:"),
    "another name": (WORDS, "def common(a, b):\n    return []"),
    "it raises": (WORDS, "def shared(a, b):\n    raise ValueError(a)"),
    "code behind it": (WORDS, "def shared(a, b):\n    return sorted(set(a) & set(b))\n\nprint(shared('a', 'b'))"),
}  # fmt: skip
CHEATS = {
    "it ends early": "import os\ndef shared(a, b):\n    os._exit(0)",
    "equal to everything": "class All:\n    def __eq__(self, other): return True\n    def __iter__(self): return iter('b')\ndef shared(a, b):\n    return All()",
    "set is another": "import builtins\nbuiltins.set = lambda values: 0\nbuiltins.list = 0\ndef shared(a, b):\n    return []",
    "endless": "def shared(a, b):\n    while True: pass",
}  # fmt: skip


def run_together(row, code):
    """What the harness does: run the text and the tests in one process."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            exec(code + "\n" + "\n".join(row["test_list"][:3]), {})
        except Exception:
            return False
    return True


@pytest.fixture(scope="module")
def run():
    if isinstance(isolation := find_sandbox(), str):
        pytest.skip("no sandbox here")
    return lambda row, code: run_program(make_program(row, code), isolation)


@pytest.mark.parametrize("name", COMPLETIONS)
def test_verdicts_are_those_of_running_both_together(run, name):
    row, code = COMPLETIONS[name]
    assert run(row, code).passed == run_together(row, code) == name.startswith(("right", "code"))


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_counted_wrong(run, name):
    assert not run(WORDS, CHEATS[name]).passed


MISTAKES = {
    "a short list": ({"test_list": ["assert 1"]}, (), "line 1: has no list of at least 3 texts in test_list; a row of mbpp has text, code, test_list"),
    "no code": ({"code": None}, (), "line 1: has no text in code; a row of mbpp has"),
    "protocol": ({}, ("--protocol", "authors"), "--tasks: mbpp is no task of the protocol authors"),
    "exemplars": ({}, ("--exemplars", "rows.jsonl"), "rows.jsonl: holds 1 exemplars where 3 are needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name, tmp_path, monkeypatch, capsys):
    changes, options, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | changes) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "nano", "--tasks", "mbpp", "--task-data", "rows.jsonl", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
