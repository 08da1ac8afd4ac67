"""What each verb does: call one function and print. The only place that prints or exits; `command_line.py` parses."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from finetune.cli.libraries import is_main_process, load_for_plan, quiet_libraries
from finetune.cli.parser import Verb, make_parser
from finetune.errors import FinetuneError, RecipeError

if TYPE_CHECKING:
    from finetune.check.chains import Chain
    from finetune.recipe.sections import Recipe

_SUCCESS, _BUG, _USER_ERROR, _INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 fine, 2 the user's input, 1 our bug (with its traceback), 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show Chinese must not end the run
    arguments = make_parser(_VERBS).parse_args(argv)
    quiet_libraries()
    signal.signal(signal.SIGTERM, _stop)
    # At the end Python would search everything that torch has loaded for garbage, a third of a second for nothing.
    atexit.register(gc.freeze)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except FinetuneError as error:
        if is_main_process():
            print(f"finetune {arguments.verb}: {error}", file=sys.stderr)
        status = _USER_ERROR
    except KeyboardInterrupt:
        print(f"finetune {arguments.verb}: interrupted", file=sys.stderr)
        status = _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _SUCCESS
    sys.exit(status)


def _stop(number: int, frame: FrameType | None) -> None:
    """End as after an error, so that what is half-written is removed."""
    sys.exit(128 + number)


def _run_checkpoints(arguments: argparse.Namespace) -> int:
    if arguments.states is not None:
        from finetune.yulan.states.state_report import describe_states, report_states

        report = report_states(arguments.states)
        return _print_result(arguments, report.to_json(), describe_states(report))
    from finetune.checkpoints.checkpoint_table import CHECKPOINTS, describe_checkpoints

    rows = [asdict(checkpoint) for checkpoint in CHECKPOINTS]
    return _print_result(arguments, rows, describe_checkpoints())


def _run_mixtures(arguments: argparse.Namespace) -> int:
    from finetune.mixtures.published import choose_mixtures, describe_datasets, describe_mixtures, list_used_datasets

    if arguments.datasets:
        used = list_used_datasets()
        return _print_result(arguments, used, "\n".join(f"{entry['name']:<40} {entry['url']}" for entry in used))
    mixtures = choose_mixtures(arguments.phase)
    if arguments.plot is not None:
        from finetune.mixtures.mixture_plot import draw_mixtures

        draw_mixtures(arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)
    text = describe_mixtures(mixtures) if arguments.phase is None else "\n\n".join(map(describe_datasets, mixtures))
    return _print_result(arguments, [mixture.to_json() for mixture in mixtures], text)


def _run_fold(arguments: argparse.Namespace) -> int:
    from finetune.checkpoints.finding import find_checkpoint
    from finetune.files.sizes import describe_size, parse_size
    from finetune.yulan.folding import fold_checkpoint

    limit = parse_size(arguments.max_shard_size)
    report = fold_checkpoint(find_checkpoint(arguments.checkpoint), arguments.output, arguments.dtype, limit)
    text = f"{report.output}: {report.tensors} tensors, {describe_size(report.bytes)} of {report.dtype} in {report.seconds:.1f} s"
    return _print_result(arguments, _to_json(report), text)


def _run_check(arguments: argparse.Namespace) -> int:
    from finetune.check.chains import dump_chain, is_chain, load_chain, to_plain_chain
    from finetune.check.recipes import load_recipe
    from finetune.recipe.sections import dump_recipe, to_plain

    try:
        if is_chain(arguments.recipe):
            chain = load_chain(arguments.recipe, arguments.set)
            recipes = [stage.recipe for stage in chain.trainings]
            plain, text = to_plain_chain(chain), dump_chain(chain)
        else:
            recipes = [load_recipe(arguments.recipe, arguments.set)]
            plain, text = to_plain(recipes[0]), dump_recipe(recipes[0])
    except RecipeError as error:
        if not arguments.json:
            raise
        print(json.dumps({"ok": False, "problems": error.problems, "recipe": None}, ensure_ascii=False))
        return _USER_ERROR
    notes = "".join(map(_describe_mixture, recipes))
    return _print_result(
        arguments, {"ok": True, "problems": [], "recipe": plain}, f"{text}\n{notes}{arguments.recipe}: fine"
    )


def _describe_mixture(recipe: Recipe) -> str:
    from finetune.mixtures.matched import match_sources
    from finetune.mixtures.published import find_mixture

    mixture = find_mixture(recipe.data.mixture) if recipe.data.mixture else None
    return f"{match_sources(mixture, recipe.data.sources).describe()}\n" if mixture else ""


def _run_preview(arguments: argparse.Namespace) -> int:
    from finetune.data.preview.preview import describe_preview, preview_rows
    from finetune.train.run import prepare_rows

    def preview_recipe(recipe: Recipe, stage: str) -> tuple[Any, str]:
        tokenizer, splits = prepare_rows(recipe)
        preview = preview_rows(splits, tokenizer, arguments.rows)
        if arguments.html is not None:
            from finetune.data.preview.page import collect_page, render_page, write_page

            file = arguments.html.with_stem(f"{arguments.html.stem}-{stage}") if stage else arguments.html
            write_page(file, render_page(collect_page(splits, tokenizer, arguments.rows, arguments.recipe.name)))
            print(f"wrote {file}", file=sys.stderr)
        return _to_json(preview), describe_preview(preview, in_colour=sys.stdout.isatty())

    return _print_each(arguments, preview_recipe)


def _run_lint(arguments: argparse.Namespace) -> int:
    from finetune.data.lint.findings import describe_fix, describe_lint
    from finetune.data.lint.lint_rows import lint_data
    from finetune.train.run import open_data

    def lint_recipe(recipe: Recipe, stage: str) -> tuple[Any, str]:
        folder = arguments.fix / stage if arguments.fix is not None else None
        report = lint_data(*open_data(recipe), folder)
        text = describe_lint(report)
        if folder is not None:
            text += f"\n\n{describe_fix(report)}: {folder}"
        return report.to_json(), text

    return _print_each(arguments, lint_recipe)


def _run_plan(arguments: argparse.Namespace) -> int:
    from finetune.plan.hardware import parse_memory

    chain = _load_chain(arguments)
    recipes = _load_recipes(arguments, chain)
    continued = {stage.name for stage in chain.trainings if stage.goes_on} if chain is not None else set()
    memory = parse_memory(arguments.memory) if arguments.memory else None
    with load_for_plan():
        from finetune.plan.automatic import choose_settings, describe_choices
        from finetune.plan.forecast import choose_target, describe_plan, describe_steps, find_fitting_plan, make_plan

    engine, processes = arguments.engine, arguments.processes
    if arguments.accelerate is not None:
        from finetune.plan.step.sharing import read_sharing

        found, count = read_sharing(arguments.accelerate)
        engine, processes = engine or found, processes or count

    def plan_recipe(recipe: Recipe, stage: str) -> tuple[Any, str]:
        target = choose_target(recipe, memory, arguments.gpu, engine, processes)
        target = replace(target, goes_on=stage in continued)
        recipe, choices = choose_settings(recipe, target)
        notes = f"\n\n{describe_choices(choices)}" if choices else ""
        if not arguments.fit:
            plan = make_plan(recipe, target)
            result = {**plan.to_json(), "choices": [asdict(choice) for choice in choices]}
            return result, f"{describe_plan(plan)}{notes}"
        plan, steps = find_fitting_plan(recipe, target)
        result = {**plan.to_json(), "changes": [asdict(step) for step in steps]}
        return result, f"{describe_plan(plan)}\n\n{describe_steps(steps)}"

    return _print_each(arguments, plan_recipe, recipes)


def _load_chain(arguments: argparse.Namespace) -> Chain | None:
    from finetune.check.chains import is_chain, load_chain

    return load_chain(arguments.recipe, arguments.set) if is_chain(arguments.recipe) else None


def _load_recipes(arguments: argparse.Namespace, chain: Chain | None) -> Mapping[str, Recipe]:
    """Return the recipe under an empty name, or those of a chain under the names of their stages."""
    from finetune.check.recipes import load_recipe

    if chain is not None:
        return {stage.name: stage.recipe for stage in chain.trainings}
    return {"": load_recipe(arguments.recipe, arguments.set)}


def _print_each(
    arguments: argparse.Namespace,
    look: Callable[[Recipe, str], tuple[Any, str]],
    recipes: Mapping[str, Recipe] | None = None,
) -> int:
    """Look at a recipe, or at every stage of a chain, and print what each gives."""
    found = {
        name: look(recipe, name)
        for name, recipe in (recipes or _load_recipes(arguments, _load_chain(arguments))).items()
    }
    if "" in found:
        return _print_result(arguments, *found[""])
    result = {"stages": {name: result for name, (result, _) in found.items()}}
    return _print_result(arguments, result, "\n\n".join(f"stage {name}\n\n{text}" for name, (_, text) in found.items()))


def _run_doctor(arguments: argparse.Namespace) -> int:
    from finetune.plan.doctor import describe_machine, examine_machine

    report = examine_machine()
    return _print_result(arguments, asdict(report), describe_machine(report))


def _run_train(arguments: argparse.Namespace) -> int:
    from finetune.check.chains import is_chain, load_chain
    from finetune.check.recipes import load_recipe

    # Before the seconds that importing torch takes.
    if is_chain(arguments.recipe):
        chain = load_chain(arguments.recipe, arguments.set)
        from finetune.models.engine import leave_processes
        from finetune.pipeline.chain import describe_chain, run_chain

        done = run_chain(chain, arguments.resume, arguments.force)
        leave_processes()
        return _print_result(arguments, asdict(done), describe_chain(done))
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.models.engine import leave_processes
    from finetune.pipeline.training import train_on_device
    from finetune.runs.summary import describe_run

    summary = train_on_device(recipe, arguments.resume, arguments.force)
    leave_processes()
    text = f"{describe_run(summary)}\nexport it: finetune export {summary.run} -o DIR"
    return _print_result(arguments, asdict(summary), text)


def _run_export(arguments: argparse.Namespace) -> int:
    from finetune.export.merge import ExportSettings, describe_export, export_result
    from finetune.files.sizes import parse_size
    from finetune.runs.results import open_result

    settings = ExportSettings(arguments.dtype, parse_size(arguments.max_shard_size), arguments.base)
    verifier = None
    if not arguments.no_verify:  # the models that it runs need libraries that take seconds to load
        from finetune.export.verify import LogitVerifier

        verifier = LogitVerifier()
    report = export_result(open_result(arguments.result), arguments.output, settings, verifier)
    return _print_result(arguments, _to_json(report), describe_export(report))


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluate.pairs import evaluate_pairs, hold_pairs
    from finetune.evaluate.token_loss import evaluate_path

    if hold_pairs(arguments.data):
        found = evaluate_pairs(arguments.model, arguments.data, arguments.max_tokens)
        text = f"right on {found.accuracy:.1%} of {found.pairs:,} pairs, ahead by {found.margin:.4g} ({found.measure})"
        return _print_result(arguments, asdict(found), text)
    scores = evaluate_path(arguments.model, arguments.data, arguments.max_tokens)
    text = (
        f"loss {scores.loss:.4f}, perplexity {scores.perplexity:.2f}, token accuracy {scores.accuracy:.1%} "
        f"over {scores.tokens:,} trained tokens"
    )
    return _print_result(arguments, asdict(scores), text)


def _run_chat(arguments: argparse.Namespace) -> int:
    from finetune.evaluate.chat import answer, open_model

    loaded = open_model(arguments.model)
    history = [{"role": "system", "content": arguments.system}] if arguments.system else []

    def reply(text: str) -> Any:
        messages = [*history, {"role": "user", "content": text}]
        return answer(loaded, messages, arguments.max_new_tokens, arguments.temperature)

    if arguments.prompt is not None:
        result = reply(arguments.prompt)
        return _print_result(
            arguments, {"answer": result.text, "tokens": result.tokens, "stopped_by": result.stopped_by}, result.text
        )
    print("Ctrl-D ends the talk.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return _SUCCESS
        if text:
            result = reply(text)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
            print(result.text)


def _run_demo(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging

    from finetune.pipeline.demo import describe_demo, run_demo

    transformers_logging.disable_progress_bar()  # one bar for each of six loads of a tiny model is noise
    result = run_demo(arguments.output)
    return _print_result(arguments, _to_json(result), describe_demo(result))


_VERBS: Mapping[str, Verb] = {
    "checkpoints": _run_checkpoints,
    "mixtures": _run_mixtures,
    "fold": _run_fold,
    "check": _run_check,
    "preview": _run_preview,
    "lint": _run_lint,
    "plan": _run_plan,
    "doctor": _run_doctor,
    "train": _run_train,
    "export": _run_export,
    "evaluate": _run_evaluate,
    "chat": _run_chat,
    "demo": _run_demo,
}


def _print_result(arguments: argparse.Namespace, result: Any, text: str) -> int:
    if is_main_process():
        print(json.dumps(result, ensure_ascii=False) if arguments.json else text)
    return _SUCCESS


def _to_json(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value), default=str))
