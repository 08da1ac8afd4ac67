"""Run `finetune init`: ask four questions, or take their answers from options, and write a first recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune.cli.printing import print_result, to_json
from finetune.errors import OutputError
from finetune.files.folders import check_file_is_new
from finetune.files.terminal import escape_controls


def run_init(arguments: argparse.Namespace) -> int:
    check_file_is_new(arguments.output)
    path = _choose(arguments, arguments.data, "Which rows, a file or a folder?", None)
    from finetune.pipeline.first_recipe import (
        THIS_MACHINE,
        choose_device_target,
        choose_goal,
        describe_first_recipe,
        look_at_data,
        write_first_recipe,
    )

    facts = look_at_data(Path(path))
    usual = choose_goal(facts, arguments.goal)
    question = f"{facts.rows:,} rows ({facts.format}). Train them for {', '.join(facts.goals)}?"
    goal = choose_goal(facts, _choose(arguments, arguments.goal, question, usual.name))
    checkpoint = _choose(arguments, arguments.base, "Which base checkpoint or run?", goal.checkpoint)
    question = "Which GPU: its memory (8GB), its name, cpu, or auto for this machine?"
    target = choose_device_target(_choose(arguments, arguments.device, question, THIS_MACHINE))
    first = write_first_recipe(facts, goal, checkpoint, target, arguments.output)
    return print_result(arguments, to_json(first), describe_first_recipe(first))


def _choose(arguments: argparse.Namespace, given: object, question: str, default: str | None) -> str:
    """Return an option's value, or the answer to its question; where nobody can be asked, the default.

    Raises:
        OutputError: there is neither an answer nor a default.
    """
    if given is not None:
        return str(given)
    answer = ""
    if not arguments.yes and not arguments.json and sys.stdin.isatty():
        hint = "" if default is None else f" [{default}]"
        print(escape_controls(f"{question}{hint} "), end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline().strip()
    if not answer and default is None:
        raise OutputError("--data is missing; name a file or a folder with your rows, such as --data my.jsonl")
    return answer or str(default)
