"""MBPP: a function by its description and three of its tests, judged by running these tests.

Source: mbpp of lm-evaluation-harness 0.4.13.
"""

import ast
import builtins
import contextlib
import sys
from collections.abc import Iterator, Sequence

from finetune.evaluation.asking.generation import Generated
from finetune.evaluation.sandbox.programs import Program
from finetune.evaluation.tasks.task_forms import Question, Row, Sample, Tools
from finetune.evaluation.tasks.task_names import MBPP_SHOTS

SECONDS = 3.0
# The harness shows these rows of the split `prompt`.
_SHOWN_IDS = (2, 3, 4)
_END = "\n[DONE]"


def ask(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Put three worked rows before each description."""
    before = "".join(f"{_describe(shot)}{shot['code']}{_END}\n\n" for shot in choose_shots(exemplars))
    return [Question(before + _describe(row), f"{row['code']}{_END}") for row in rows]


def choose_shots(exemplars: Sequence[Row]) -> list[Row]:
    """Return the rows that the harness shows, or the first three of a file that lacks them."""
    numbered = {row.get("task_id"): row for row in exemplars}
    shown = [numbered[number] for number in _SHOWN_IDS if number in numbered]
    return shown if len(shown) == MBPP_SHOTS.count else list(exemplars[: MBPP_SHOTS.count])


def _describe(row: Row) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def score(row: Row, found: Sequence[Generated], tools: Tools) -> Sample:
    """Run the first three tests on what was generated."""
    text = found[0].text
    verdict = tools.run_program(make_program(row, text))
    return {"task_id": row.get("task_id"), "generated": text, "passed": verdict.passed, "result": verdict.reason}


def make_program(row: Row, code: str) -> Program:
    """Return the program that tests a text for a row; the tests see the modules of Python that the text imports."""
    tests = "\n".join(row["test_list"][:3])
    imports = "".join(f"import {name}\n" for name in _list_imports(code))
    entry_point = find_function(tests, row["code"], code)
    return Program(preamble=imports, given="", completion=code, tests=tests, entry_point=entry_point, seconds=SECONDS)


def find_function(tests: str, *programs: str) -> str:
    """Return the function that tests call, also within `set(...)`; nothing where there is none.

    It is the first name that is no built-in one; else, as `def sum(a, b)` takes the place of Python's own, the first that one of the
    programs defines.
    """
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except SyntaxError:
        return ""
    calls = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    defined = {name for program in programs for name in _list_defined(program)}
    own = [name for name in calls if not hasattr(builtins, name)] + [name for name in calls if name in defined]
    return own[0] if own else ""


def _list_defined(code: str) -> Iterator[str]:
    """Yield the functions and classes that a text defines at its top."""
    for node in _parse(code):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def _list_imports(code: str) -> Iterator[str]:
    """Yield the modules of Python's own library that a text imports at its top under their own names."""
    for node in _parse(code):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.asname is None]
            yield from (name for name in names if name in sys.stdlib_module_names)


def _parse(code: str) -> list[ast.stmt]:
    """Return the statements of a text, or none where it is no Python."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(code).body
    return []
