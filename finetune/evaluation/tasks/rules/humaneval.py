"""HumanEval: the body of a function, judged by running the row's tests.

Source: humaneval of lm-evaluation-harness 0.4.13; LLMBox at 5a1cfe2 as the authors called it.
"""

import re
from collections.abc import Sequence
from typing import Any

from finetune.evaluation.asking.generation import Generated
from finetune.evaluation.sandbox.programs import Program
from finetune.evaluation.tasks.task_forms import Question, Row, Sample, Tools

HARNESS_SECONDS, AUTHORS_SECONDS = 3.0, 1.0
_NO_RETURN = "# No return statement found\n"
_RETURN = re.compile(r"^\s+return[^\n]*\n", re.MULTILINE)
_DEFINITION = re.compile(r"def[^\n]*\n")
# Where a base model begins the next function, ends its block, or runs and explains what it wrote.
_ENDS = ("def ", "```", "\nif", "\n#")
_PREAMBLE = """\
import math, re, sys, copy, datetime, itertools, collections, heapq, functools, hashlib, numpy, string
import numpy as np
from typing import *
from collections import *
"""


def ask_harness(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Return the prompts as they are."""
    return [Question(row["prompt"], row["canonical_solution"]) for row in rows]


def score_harness(row: Row, found: Sequence[Generated], tools: Tools) -> Sample:
    """Run the tests on the prompt and what was generated."""
    text = found[0].text
    verdict = tools.run_program(make_program(row, text, HARNESS_SECONDS))
    return {"task_id": row["task_id"], "generated": text, "passed": verdict.passed, "result": verdict.reason}


def make_program(row: Row, code: str, seconds: float, preamble: str = "") -> Program:
    """Return the program that tests a completion of a row."""
    return Program(
        preamble=preamble,
        given=row["prompt"],
        completion=code,
        tests=f"{row['test']}\ncheck({row['entry_point']})",
        entry_point=row["entry_point"],
        seconds=seconds,
    )


def ask_authors(rows: Sequence[Row], exemplars: Sequence[Row], tools: Tools) -> list[Question]:
    """Return the prompts without white space at either end; the gold answer then begins with the line break."""
    return [Question(row["prompt"].strip(), f"\n{row['canonical_solution']}") for row in rows]


def score_authors(row: Row, found: Sequence[Generated], tools: Tools) -> Sample:
    """Cut each text, run the tests on it, and return the share that passes: pass@1 = 1 - C(n - c, 1) / C(n, 1) = c / n."""
    codes = [cut_code(one.text) for one in found]
    verdicts = [tools.run_program(make_program(row, code, AUTHORS_SECONDS, _PREAMBLE)) for code in codes]
    passed = [verdict.passed for verdict in verdicts]
    sample: Sample = {"task_id": row["task_id"], "share": sum(passed) / len(passed)}
    fields: dict[str, list[Any]] = {
        "generated": [one.text for one in found],
        "extracted": codes,
        "passed": passed,
        "result": [verdict.reason for verdict in verdicts],
    }
    return sample | {name: values if len(found) > 1 else values[0] for name, values in fields.items()}


def cut_code(text: str) -> str:
    """Cut a text as the authors did: after its first indented `return`, where something else begins.

    Everything up to the end of the first line with `def` goes too, also where it is part of a word such as `undefined`.
    """
    text += "" if text.endswith("\n") else "\n"
    returns = _RETURN.search(text)
    if returns is None:
        return _NO_RETURN
    ends = [place for end in _ENDS if (place := text.find(end, returns.end())) >= 0]
    text = text[: min(ends, default=len(text))]
    if (definition := _DEFINITION.search(text)) is not None:
        text = text[definition.end() :]
    return text.rstrip()
