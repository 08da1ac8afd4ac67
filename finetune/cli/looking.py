"""Run the verbs that only show something; they write only the files that the user asks for."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from finetune.errors import OutputError, RecipeError
from finetune.files.speed import load_for_plan

if TYPE_CHECKING:
    from finetune.check.chain_stages import TrainStage
    from finetune.recipe.sections import Recipe
from finetune.cli.printing import SUCCESS, USER_ERROR, print_each, print_result, to_json
from finetune.files.terminal import escape_json


def run_checkpoints(arguments: argparse.Namespace) -> int:
    if arguments.states is not None:
        from finetune.yulan.states.state_report import describe_states, report_states

        report = report_states(arguments.states)
        return print_result(arguments, report.to_json(), describe_states(report))
    from finetune.checkpoints.checkpoint_table import CHECKPOINTS, describe_checkpoints

    rows = [asdict(checkpoint) for checkpoint in CHECKPOINTS]
    return print_result(arguments, rows, describe_checkpoints())


def run_mixtures(arguments: argparse.Namespace) -> int:
    from finetune.mixtures.published import choose_mixtures, describe_datasets, describe_mixtures, list_used_datasets

    if arguments.datasets:
        used = list_used_datasets()
        return print_result(arguments, used, "\n".join(f"{entry['name']:<40} {entry['url']}" for entry in used))
    mixtures = choose_mixtures(arguments.phase)
    if arguments.plot is not None:
        from finetune.mixtures.mixture_plot import draw_mixtures

        draw_mixtures(arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)
    text = describe_mixtures(mixtures) if arguments.phase is None else "\n\n".join(map(describe_datasets, mixtures))
    return print_result(arguments, [mixture.to_json() for mixture in mixtures], text)


def run_check(arguments: argparse.Namespace) -> int:
    from finetune.check.chain_stages import dump_chain, to_plain_chain
    from finetune.check.chains import load_chain

    try:
        chain = load_chain(arguments.recipe, arguments.set)
    except RecipeError as error:
        if not arguments.json:
            raise
        print(escape_json(json.dumps({"ok": False, "problems": error.problems, "recipe": None}, ensure_ascii=False)))
        return USER_ERROR
    notes = "".join(_describe_mixture(stage.recipe) + _describe_tasks(stage.recipe) for stage in chain.trainings)
    result = {"ok": True, "problems": [], "recipe": to_plain_chain(chain)}
    return print_result(arguments, result, f"{dump_chain(chain)}\n{notes}{arguments.recipe}: fine")


def _describe_mixture(recipe: Recipe) -> str:
    from finetune.mixtures.matched import match_sources
    from finetune.mixtures.published import find_mixture

    mixture = find_mixture(recipe.data.mixture) if recipe.data.mixture else None
    return f"{match_sources(mixture, recipe.data.sources).describe()}\n" if mixture else ""


def _describe_tasks(recipe: Recipe) -> str:
    from finetune.check.data_section import describe_task_sources

    return "".join(f"{line}\n" for line in describe_task_sources(recipe.data))


def run_preview(arguments: argparse.Namespace) -> int:
    from finetune.check.chains import load_chain
    from finetune.data.preview.preview import describe_preview, preview_rows
    from finetune.training.training_rows import prepare_rows

    def preview_stage(stage: TrainStage) -> tuple[Any, str]:
        tokenizer, splits = prepare_rows(stage.resolved)
        preview = preview_rows(splits, tokenizer, arguments.rows)
        if arguments.html is not None:
            from finetune.data.preview.page import collect_page, render_page, write_page

            file = arguments.html
            file = file.with_stem(f"{file.stem}-{stage.name}") if stage.name else file
            write_page(file, render_page(collect_page(splits, tokenizer, arguments.rows, arguments.recipe.name)))
            print(f"wrote {file}", file=sys.stderr)
        return to_json(preview), describe_preview(preview, in_colour=sys.stdout.isatty())

    return print_each(arguments, load_chain(arguments.recipe, arguments.set), preview_stage)


def run_lint(arguments: argparse.Namespace) -> int:
    from finetune.check.chains import load_chain
    from finetune.data.lint.lint_data import lint_data
    from finetune.data.lint.lint_report import describe_fix, describe_lint
    from finetune.training.training_rows import open_data

    if arguments.only is not None and arguments.fix is None:
        raise OutputError("--only says which rows --fix leaves out; name a new folder too, such as --fix clean")

    def lint_stage(stage: TrainStage) -> tuple[Any, str]:
        folder = arguments.fix / stage.name if arguments.fix is not None else None
        report = lint_data(*open_data(stage.resolved), folder, arguments.only)
        text = describe_lint(report)
        if folder is not None:
            text += f"\n\n{describe_fix(report)}: {folder}"
        return report.to_json(), text

    return print_each(arguments, load_chain(arguments.recipe, arguments.set), lint_stage)


def run_plan(arguments: argparse.Namespace) -> int:
    from finetune.check.chains import load_chain
    from finetune.files.sizes import parse_memory

    # The recipe is checked before torch is imported, which takes seconds.
    chain = load_chain(arguments.recipe, arguments.set)
    memory = parse_memory(arguments.memory) if arguments.memory else None
    with load_for_plan():
        from finetune.planning.automatic import choose_settings, describe_choices
        from finetune.planning.forecast import (
            choose_target,
            describe_plan,
            describe_steps,
            find_fitting_plan,
            make_plan,
        )

    engine, processes = arguments.engine, arguments.processes
    if arguments.accelerate is not None:
        from finetune.planning.step.sharing import read_sharing

        found, count = read_sharing(arguments.accelerate)
        engine, processes = engine or found, processes or count

    def plan_stage(stage: TrainStage) -> tuple[Any, str]:
        target = choose_target(stage.resolved, memory, arguments.gpu, engine, processes)
        resolved, choices = choose_settings(stage.resolved, target)
        notes = f"\n\n{describe_choices(choices)}" if choices else ""
        if not arguments.fit:
            plan = make_plan(resolved, target)
            result = {**plan.to_json(), "choices": [asdict(choice) for choice in choices]}
            return result, f"{describe_plan(plan)}{notes}"
        plan, steps = find_fitting_plan(resolved, target)
        result = {**plan.to_json(), "changes": [asdict(step) for step in steps]}
        return result, f"{describe_plan(plan)}\n\n{describe_steps(steps)}"

    return print_each(arguments, chain, plan_stage)


def run_doctor(arguments: argparse.Namespace) -> int:
    from finetune.planning.doctor import describe_machine, examine_machine

    report = examine_machine()
    return print_result(arguments, asdict(report), describe_machine(report))


def run_recipes(arguments: argparse.Namespace) -> int:
    if arguments.keys:
        return _explain_keys(arguments)
    if arguments.agents:
        return _guide_assistants(arguments)
    if arguments.name is None:
        return _list_recipes(arguments)
    from finetune.files.resources import find_launch_file, find_shipped_recipe, list_launch_files
    from finetune.guide.recipe_copy import copy_recipe

    file = find_launch_file(arguments.name)
    is_launch_file = file in list_launch_files().values()
    text = file.read_text(encoding="utf-8") if is_launch_file else copy_recipe(find_shipped_recipe(arguments.name))
    return _write_text(arguments, {"recipe": str(arguments.name), "text": text}, text)


def _explain_keys(arguments: argparse.Namespace) -> int:
    from finetune.guide.key_guide import list_keys_as_json, render_key_guide

    _refuse_name(arguments, "--keys")
    return _write_text(arguments, list_keys_as_json(), render_key_guide())


def _guide_assistants(arguments: argparse.Namespace) -> int:
    from finetune.guide.assistant_guide import render_assistant_guide

    _refuse_name(arguments, "--agents")
    text = render_assistant_guide(arguments.verbs)
    return _write_text(arguments, {"text": text}, text)


def _refuse_name(arguments: argparse.Namespace, option: str) -> None:
    if arguments.name is not None:
        raise RecipeError(option, [f"explains every recipe; leave {arguments.name} out"])


def _list_recipes(arguments: argparse.Namespace) -> int:
    from finetune.guide.shipped_recipes import describe_shipped_recipes, list_shipped_recipes

    if arguments.output is not None:
        raise RecipeError("-o", ["needs the name of a recipe to copy, such as: finetune recipes sft_qlora -o my.yaml"])
    rows = list_shipped_recipes()
    return print_result(arguments, [asdict(row) for row in rows], describe_shipped_recipes(rows))


def _write_text(arguments: argparse.Namespace, result: Any, text: str) -> int:
    """Write a text to the file of `--output`, or print it."""
    from finetune.files.folders import write_new_file

    if arguments.output is None or str(arguments.output) == "-":
        return print_result(arguments, result, text.removesuffix("\n"))
    write_new_file(arguments.output, text)
    print(f"wrote {arguments.output}", file=sys.stderr)
    return print_result(arguments, {"output": str(arguments.output)}, "") if arguments.json else SUCCESS
