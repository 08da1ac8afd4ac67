"""Run the verbs that answer a question with several small runs."""

from __future__ import annotations

import argparse

from finetune.cli.measuring.measuring import read_task_settings
from finetune.cli.printing import USER_ERROR, print_result
from finetune.errors import RecipeError


def run_sweep(arguments: argparse.Namespace) -> int:
    from finetune.pipeline.sweeping.sweep_grid import plan_sweep

    # The recipes are checked before torch is imported, which takes seconds.
    sweep = plan_sweep(arguments.recipe, arguments.set, arguments.seeds, arguments.output)
    from finetune.pipeline.sweeping.sweep_run import run_sweep

    report = run_sweep(sweep)
    status = print_result(arguments, report.to_json(), report.describe())
    return USER_ERROR if report.failures else status


def run_microanneal(arguments: argparse.Namespace) -> int:
    from finetune.pipeline.dynamics.tuning import TuningSettings
    from finetune.pipeline.microanneal.anneal_plan import AnnealRequest, plan_anneal

    if arguments.sft is None and (arguments.chat or arguments.sft_set):
        raise RecipeError(
            "microanneal", ["--chat and --sft-set are about the recipe of --sft; name one, or leave them out"]
        )
    tuning = None
    if arguments.sft is not None:
        tuning = TuningSettings(arguments.sft, tuple(arguments.sft_set), arguments.chat)
    request = AnnealRequest(
        candidate=tuple(arguments.candidate),
        share=arguments.share,
        tokens=arguments.tokens,
        start=arguments.start,
        output=arguments.output,
        mixture=arguments.mixture,
        held_out=tuple(arguments.held_out),
        recipe=arguments.recipe,
        overrides=tuple(arguments.set),
        tuning=tuning,
    )
    # The recipes are checked before torch is imported, which takes seconds.
    plan = plan_anneal(request, asks_tasks=arguments.tasks is not None)
    from finetune.pipeline.microanneal.anneal_run import run_microanneal

    tasks = None if arguments.tasks is None else read_task_settings(arguments, chat=False)
    report = run_microanneal(plan, tasks)
    return print_result(arguments, report.to_json(), report.describe())
