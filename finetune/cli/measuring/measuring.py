"""Run the verbs that measure models on rows and tasks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from finetune.cli.printing import print_result
from finetune.errors import OutputError, RecipeError, describe_count

if TYPE_CHECKING:
    from finetune.evaluation.tasks.task_settings import TaskSettings


def run_evaluate(arguments: argparse.Namespace) -> int:
    if arguments.tasks is not None:
        return _evaluate_tasks(arguments)
    from finetune.evaluation.pairs import evaluate_pairs, hold_pairs
    from finetune.evaluation.token_loss import evaluate_path
    from finetune.evaluation.worst_rows import describe_worst

    in_colour = sys.stdout.isatty()
    if hold_pairs(arguments.data):
        found = evaluate_pairs(arguments.model, arguments.data, arguments.max_tokens, arguments.worst)
        text = f"right on {found.accuracy:.1%} of {describe_count(found.pairs, 'pair')}, ahead by {found.margin:.4g} ({found.measure})"
        text += describe_worst(found.worst, "margin", in_colour=in_colour)
        return print_result(arguments, asdict(found), text)
    scores = evaluate_path(arguments.model, arguments.data, arguments.max_tokens, arguments.worst)
    error = "" if scores.stderr is None else f" ± {scores.stderr:.4f}"
    text = (
        f"loss {scores.loss:.4f}{error}, perplexity {scores.perplexity:.2f}, token accuracy {scores.accuracy:.1%} "
        f"over {describe_count(scores.tokens, 'trained token')}"
    )
    text += describe_worst(scores.worst, "loss", in_colour=in_colour)
    return print_result(arguments, asdict(scores), text)


def _evaluate_tasks(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.asking.engines import read_engine
    from finetune.evaluation.tasks.run_tasks import evaluate_tasks

    settings = read_task_settings(arguments, chat=arguments.chat)
    if arguments.engine is not None:
        settings = replace(settings, engine=read_engine(arguments.engine))
    found = evaluate_tasks(arguments.model, settings, arguments.output)
    return print_result(arguments, found.to_json(), found.describe())


def read_task_settings(arguments: argparse.Namespace, *, chat: bool) -> TaskSettings:
    from finetune.evaluation.tasks.task_settings import TaskSettings

    return TaskSettings(
        tasks=arguments.tasks,
        protocol=arguments.protocol,
        limit=arguments.limit,
        data=arguments.task_data,
        exemplars=arguments.exemplars,
        batch_size=arguments.batch_size,
        chat=chat,
        unsafe_code=arguments.unsafe_code,
    )


def run_dynamics(arguments: argparse.Namespace) -> int:
    if arguments.published:
        beside = (arguments.output, arguments.tasks, arguments.rows, arguments.sft, arguments.set, arguments.chat)
        if any(beside) or arguments.keep != "all":
            raise OutputError(
                "--published compares the authors' own scores alone, and fetches and writes nothing; leave the other options out, or "
                "leave --published out: measured scores stand beside the published ones anyway"
            )
        from finetune.growth.published_scores import compare_published

        known = compare_published(arguments.checkpoints)
        return print_result(arguments, known.to_json(), known.describe())
    if arguments.output is None:
        raise OutputError("-o is missing; name a folder for the results, such as -o dynamics, or ask for --published")
    if arguments.sft is None and (arguments.chat or arguments.set):
        raise RecipeError("dynamics", ["--chat and --set are about the recipe of --sft; name one, or leave them out"])
    if arguments.sft is not None:
        from finetune.check.recipes import load_recipe

        # The recipe is checked before torch is imported, which takes seconds.
        load_recipe(arguments.sft, [*arguments.set, f"model.checkpoint={arguments.checkpoints[0]}"])
    from finetune.pipeline.dynamics.dynamics_inputs import DynamicsSettings
    from finetune.pipeline.dynamics.run_dynamics import run_dynamics
    from finetune.pipeline.dynamics.tuning import TuningSettings

    tasks = None if arguments.tasks is None else read_task_settings(arguments, chat=False)
    tuning = None if arguments.sft is None else TuningSettings(arguments.sft, tuple(arguments.set), arguments.chat)
    settings = DynamicsSettings(tasks, arguments.keep, tuple(arguments.rows), tuning)
    found = run_dynamics(arguments.checkpoints, settings, arguments.output)
    return print_result(arguments, found.to_json(), found.describe())
