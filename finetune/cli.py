"""The command line: each verb parses, calls one function and prints. The only place that prints or exits."""

import argparse
import atexit
import gc
import io
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.errors import FinetuneError, RecipeError

_SUCCESS, _BUG, _USER_ERROR, _INTERRUPTED = 0, 1, 2, 130
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 fine, 2 the user's input, 1 our bug (with its traceback), 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show Chinese must not end the run
    arguments = _make_parser().parse_args(argv)
    _quiet_libraries()
    signal.signal(signal.SIGTERM, _stop)
    # At the end Python would search everything that torch has loaded for garbage, a third of a second for nothing.
    atexit.register(gc.freeze)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except FinetuneError as error:
        if _is_main_process():
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


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune YuLan-Mini from any of its published checkpoints, and export verified Llama-format models.",
        epilog="Start with: finetune demo",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add_verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(run=run)
        verb.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output and nothing else"
        )
        return verb

    def add_recipe(verb: argparse.ArgumentParser) -> None:
        verb.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe file")
        verb.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")

    def add_writing(verb: argparse.ArgumentParser) -> None:
        verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
        verb.add_argument("--dtype", choices=_DTYPES, default="auto", help="type of the weights (default: as stored)")
        verb.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="largest weight file (default: 2GB)")

    add_verb("checkpoints", _run_checkpoints, "list what one can start from")
    fold = add_verb("fold", _run_fold, "write the exact Llama form of a checkpoint")
    fold.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="an alias, a hub id with an optional @revision, or a folder"
    )
    add_writing(fold)
    add_recipe(add_verb("check", _run_check, "check a recipe without loading anything"))
    preview = add_verb("preview", _run_preview, "show rows as the model will see them, with what is trained marked")
    add_recipe(preview)
    preview.add_argument("-n", "--rows", type=_read_count, default=3, metavar="N", help="how many rows (default: 3)")
    preview.add_argument(
        "--html", type=Path, metavar="FILE", help="also write them as one page that needs nothing else"
    )
    lint = add_verb(
        "lint", _run_lint, "look for what is wrong with the rows: duplicates, empty answers, overlap and more"
    )
    add_recipe(lint)
    lint.add_argument(
        "--fix", type=Path, metavar="DIR", help="write the rows that pass, as they are, into a new or empty folder"
    )
    plan = add_verb("plan", _run_plan, "predict memory and time of a training step, without a GPU and without weights")
    add_recipe(plan)
    plan.add_argument("--memory", metavar="SIZE", help="say whether it fits a GPU of this memory, such as 8GB")
    plan.add_argument("--gpu", metavar="NAME", help='say whether it fits this card, such as "RTX 4060 Laptop"')
    plan.add_argument(
        "--fit", action="store_true", help="change settings until it fits, and say what each change saves"
    )
    add_verb("doctor", _run_doctor, "what this machine has, and what the kit will therefore use")
    train = add_verb("train", _run_train, "train, and leave a run directory")
    add_recipe(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the recipe's output")
    train.add_argument("--force", action="store_true", help="train also what the plan says cannot fit this GPU")
    export = add_verb("export", _run_export, "merge a run into Llama-format weights, and prove that they are right")
    export.add_argument(
        "result", metavar="RUN", type=Path, help="a run directory, or an adapter folder that PEFT wrote"
    )
    add_writing(export)
    export.add_argument(
        "--base",
        choices=("full", "dequantized", "auto"),
        default="full",
        help="what the adapter of a quantized run is merged into (default: full); auto takes the lower held-out loss",
    )
    export.add_argument("--no-verify", action="store_true", help="skip reopening and comparing")
    evaluate = add_verb("evaluate", _run_evaluate, "loss, perplexity and token accuracy on held-out rows")
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", help="a run directory, or an alias, a hub id or a folder")
    evaluate.add_argument("--data", type=Path, required=True, nargs="+", metavar="FILE", help="rows to evaluate on")
    evaluate.add_argument(
        "--max-tokens", type=_read_count, default=2048, metavar="N", help="leave longer rows out (default: 2048)"
    )
    chat = add_verb("chat", _run_chat, "talk to a run or a model")
    chat.add_argument("model", metavar="RUN_OR_MODEL", help="a run directory, or an alias, a hub id or a folder")
    chat.add_argument("--prompt", metavar="TEXT", help="answer once and stop")
    chat.add_argument("--system", metavar="TEXT", help="a system line")
    chat.add_argument(
        "--max-new-tokens", type=_read_count, default=512, metavar="N", help="longest answer (default: 512)"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    demo = add_verb("demo", _run_demo, "the whole line in miniature: train, export, verify, answer")
    demo.add_argument("-o", "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    return parser


def _read_count(text: str) -> int:
    """Read a whole number above 0; argparse turns the error into its usual message and exit status 2."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; found {text!r}")
    return int(text)


def _run_checkpoints(arguments: argparse.Namespace) -> int:
    from finetune.checkpoints import CHECKPOINTS, describe_checkpoints

    rows = [asdict(checkpoint) for checkpoint in CHECKPOINTS]
    return _print_result(arguments, rows, describe_checkpoints())


def _run_fold(arguments: argparse.Namespace) -> int:
    from finetune.starts import find_checkpoint
    from finetune.yulan.folding import fold_checkpoint
    from finetune.yulan.shards import parse_size

    limit = parse_size(arguments.max_shard_size)
    report = fold_checkpoint(find_checkpoint(arguments.checkpoint), arguments.output, arguments.dtype, limit)
    text = f"{report.output}: {report.tensors} tensors, {_describe_bytes(report.bytes)} of {report.dtype} in {report.seconds:.1f} s"
    return _print_result(arguments, _to_json(report), text)


def _run_check(arguments: argparse.Namespace) -> int:
    from finetune.check import load_recipe
    from finetune.recipe import dump_recipe, to_plain

    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
    except RecipeError as error:
        if not arguments.json:
            raise
        print(json.dumps({"ok": False, "problems": error.problems, "recipe": None}, ensure_ascii=False))
        return _USER_ERROR
    result = {"ok": True, "problems": [], "recipe": to_plain(recipe)}
    return _print_result(arguments, result, f"{dump_recipe(recipe)}\n{arguments.recipe}: fine")


def _run_preview(arguments: argparse.Namespace) -> int:
    from finetune.check import load_recipe
    from finetune.data.preview import describe_preview, preview_rows
    from finetune.train.run import prepare_rows

    tokenizer, splits = prepare_rows(load_recipe(arguments.recipe, arguments.set))
    preview = preview_rows(splits, tokenizer, arguments.rows)
    if arguments.html is not None:
        from finetune.data.page import collect_page, render_page, write_page

        page = collect_page(splits, tokenizer, arguments.rows, arguments.recipe.name)
        write_page(arguments.html, render_page(page))
        print(f"wrote {arguments.html}", file=sys.stderr)
    return _print_result(arguments, _to_json(preview), describe_preview(preview, in_colour=sys.stdout.isatty()))


def _run_lint(arguments: argparse.Namespace) -> int:
    from finetune.check import load_recipe
    from finetune.data.lint import describe_fix, describe_lint
    from finetune.data.lint_reading import lint_data
    from finetune.train.run import open_data

    report = lint_data(*open_data(load_recipe(arguments.recipe, arguments.set)), arguments.fix)
    text = describe_lint(report)
    if arguments.fix is not None:
        text += f"\n\n{describe_fix(report)}: {arguments.fix}"
    return _print_result(arguments, report.to_json(), text)


def _run_plan(arguments: argparse.Namespace) -> int:
    from finetune.check import load_recipe
    from finetune.plan.hardware import parse_memory

    recipe = load_recipe(arguments.recipe, arguments.set)
    memory = parse_memory(arguments.memory) if arguments.memory else None
    from finetune.plan.forecast import choose_target, describe_plan, describe_steps, find_fitting_plan, make_plan

    target = choose_target(recipe, memory, arguments.gpu)
    if not arguments.fit:
        plan = make_plan(recipe, target)
        return _print_result(arguments, plan.to_json(), describe_plan(plan))
    plan, steps = find_fitting_plan(recipe, target)
    result = {**plan.to_json(), "changes": [asdict(step) for step in steps]}
    return _print_result(arguments, result, f"{describe_plan(plan)}\n\n{describe_steps(steps)}")


def _run_doctor(arguments: argparse.Namespace) -> int:
    from finetune.plan.doctor import describe_machine, examine_machine

    report = examine_machine()
    return _print_result(arguments, asdict(report), describe_machine(report))


def _run_train(arguments: argparse.Namespace) -> int:
    from finetune.check import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)  # before the seconds that importing torch takes
    from finetune.train.model import choose_device
    from finetune.train.run import run_training

    device = choose_device(bool(recipe.trainer.get("use_cpu")))
    if device.type == "cuda" and not arguments.force:
        from finetune.plan.forecast import check_fits

        check_fits(recipe, device)
    summary = run_training(recipe, arguments.resume)
    losses = f"training loss {summary.train_loss:.3f}"
    if summary.eval_loss is not None:
        losses += f", held-out loss {summary.eval_loss:.3f}"
    text = f"{summary.run}: {summary.steps} steps, {losses}, {summary.seconds:.0f} s\nexport it: finetune export {summary.run} -o DIR"
    return _print_result(arguments, asdict(summary), text)


def _run_export(arguments: argparse.Namespace) -> int:
    from finetune.export.merge import ExportSettings, describe_export, export_result
    from finetune.train.record import open_result
    from finetune.yulan.shards import parse_size

    settings = ExportSettings(arguments.dtype, parse_size(arguments.max_shard_size), arguments.base)
    verifier = None
    if not arguments.no_verify:  # the models that it runs need libraries that take seconds to load
        from finetune.export.verify import LogitVerifier

        verifier = LogitVerifier()
    report = export_result(open_result(arguments.result), arguments.output, settings, verifier)
    return _print_result(arguments, _to_json(report), describe_export(report))


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluate.loss import evaluate_path

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

    from finetune.demo import describe_demo, run_demo

    transformers_logging.disable_progress_bar()  # one bar for each of six loads of a tiny model is noise
    result = run_demo(arguments.output)
    return _print_result(arguments, _to_json(result), describe_demo(result))


def _print_result(arguments: argparse.Namespace, result: Any, text: str) -> int:
    if _is_main_process():
        print(json.dumps(result, ensure_ascii=False) if arguments.json else text)
    return _SUCCESS


def _to_json(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value), default=str))


def _describe_bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _quiet_libraries() -> None:
    """Send our notes to standard error as plain lines, and keep what libraries say to themselves out of them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("finetune")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if _is_main_process() else logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("bitsandbytes", "accelerate", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Deprecations inside the libraries are for this kit's authors, whose tests turn them into errors.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
