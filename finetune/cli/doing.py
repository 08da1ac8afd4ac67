"""Run the verbs that train, write and use models, and upload them."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.printing import SUCCESS, print_result, to_json
from finetune.errors import ExportError, FinetuneError, HubError, OutputError
from finetune.files.launcher import is_main_process
from finetune.files.terminal import escape_controls

if TYPE_CHECKING:
    from finetune.exporting.gguf.llama_cpp import LlamaCppProver
    from finetune.exporting.proof import ExportReport
    from finetune.models.plain_adapter import AdapterReport


def run_fold(arguments: argparse.Namespace) -> int:
    from finetune.checkpoints.finding import find_checkpoint
    from finetune.files.sizes import describe_size, parse_size
    from finetune.yulan.folding import fold_checkpoint

    limit = parse_size(arguments.max_shard_size)
    report = fold_checkpoint(find_checkpoint(arguments.checkpoint), arguments.output, arguments.dtype, limit)
    text = f"{report.output}: {report.tensors} tensors, {describe_size(report.bytes)} of {report.dtype} in {report.seconds:.1f} s"
    return print_result(arguments, to_json(report), text)


def run_clean(arguments: argparse.Namespace) -> int:
    from finetune.check.recipes import load_recipe

    # The recipe is checked before torch is imported, which takes seconds.
    resolved = load_recipe(arguments.recipe, arguments.set)
    if arguments.emit is not None:
        from finetune.cleaning.emit import describe_emit, emit_datatrove

        written = emit_datatrove(resolved, arguments.recipe, arguments.set, arguments.output)
        return print_result(arguments, written.to_json(), describe_emit(written))
    from finetune.cleaning.clean_report import describe_clean
    from finetune.cleaning.clean_run import clean_rows

    report = clean_rows(resolved, arguments.output)
    return print_result(arguments, report.to_json(), describe_clean(report))


def run_synthesize(arguments: argparse.Namespace) -> int:
    from finetune.check.recipes import load_recipe

    if arguments.output is None and not arguments.dry_run:
        raise OutputError("-o is missing; name a new folder for the rows, such as -o written, or ask for --dry-run")
    resolved = load_recipe(arguments.recipe, arguments.set)
    from finetune.synthesis.synthesize_run import count_requests, describe_synthesis, synthesize_rows

    report = count_requests(resolved) if arguments.dry_run else synthesize_rows(resolved, arguments.output)
    return print_result(arguments, report.to_json(), describe_synthesis(report))


def run_train(arguments: argparse.Namespace) -> int:
    from finetune.check.chains import load_chain

    # The recipe is checked before torch is imported, which takes seconds.
    chain = load_chain(arguments.recipe, arguments.set)
    from finetune.models.engine import leave_processes
    from finetune.pipeline.chain import describe_chain, run_chain

    watched = is_main_process() and arguments.watch
    with _watch([stage.resolved.output for stage in chain.trainings]) if watched else contextlib.nullcontext():
        done = run_chain(chain, arguments.resume, arguments.force)
    leave_processes()
    return print_result(arguments, done.to_json(), describe_chain(done))


@contextlib.contextmanager
def _watch(runs: Sequence[Path]) -> Iterator[None]:
    """Serve the page of runs in a process of its own, so that the training does not wait for it."""
    command = [sys.executable, "-m", "finetune", "watch", *map(str, runs), "--until-input-ends"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr)
    try:
        yield
    finally:
        server.communicate()


def run_watch(arguments: argparse.Namespace) -> int:
    from finetune.watching.board_page import write_board_page
    from finetune.watching.server import BoardServer

    if arguments.output is not None:
        left_out = write_board_page(arguments.runs, arguments.output).left_out
        return _print_board(arguments, {"output": str(arguments.output)}, f"wrote {arguments.output}", left_out)
    with BoardServer(arguments.runs, arguments.port, waits=arguments.until_input_ends) as server:
        shown = f"watch: {server.address} (only from this machine)"
        _print_board(arguments, {"address": server.address}, shown, server.left_out)
        sys.stdout.flush()
        if arguments.until_input_ends:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            sys.stdin.read()
            server.let_page_catch_up()
            server.shutdown()
        else:
            print("Press Ctrl-C to end it.", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
    return SUCCESS


def _print_board(arguments: argparse.Namespace, result: dict[str, str], text: str, left_out: Sequence[str]) -> int:
    """Print where the page is, and what of the named paths it does not show."""
    lines = (text, *(f"left out: {fault}" for fault in left_out))
    return print_result(arguments, {**result, "left_out": list(left_out)}, "\n".join(lines))


def run_export(arguments: argparse.Namespace) -> int:
    if arguments.public and arguments.push is None:
        raise ExportError("export: --public says who can read an upload; name its repository with --push OWNER/NAME")
    if arguments.push is not None:
        from finetune.hub.uploads import check_push

        check_push(arguments.push)  # before minutes of work
    if arguments.adapter:
        return _run_adapter_export(arguments)
    from finetune.exporting.merge import describe_export, export_result
    from finetune.runs.export_settings import ExportSettings
    from finetune.runs.results import open_result

    settings = ExportSettings(
        arguments.dtype, arguments.max_shard_size, arguments.base, not arguments.no_verify, tuple(arguments.gguf)
    )
    verifier = None
    if not arguments.no_verify:  # importing the verifier loads libraries, which takes seconds
        from finetune.exporting.verify import LogitVerifier

        verifier = LogitVerifier()
    prover = _make_prover(arguments) if settings.gguf else None
    result = open_result(arguments.result)
    report = export_result(result, arguments.output, settings, verifier, prover, base_model=arguments.base_model)
    return _print_and_push(arguments, report, describe_export(report))


def _run_adapter_export(arguments: argparse.Namespace) -> int:
    for option, value, default in (
        ("--dtype", arguments.dtype, "auto"),
        ("--max-shard-size", arguments.max_shard_size, "2GB"),
        ("--base", arguments.base, "full"),
        ("--base-model", arguments.base_model, None),
        ("--no-verify", arguments.no_verify, False),
        ("--gguf", arguments.gguf, []),
    ):
        if value != default:
            raise ExportError(f"{option} is for merged weights, and --adapter merges nothing; remove one of the two")
    from finetune.models.plain_adapter import describe_adapter, write_plain_adapter
    from finetune.runs.results import open_result

    report = write_plain_adapter(open_result(arguments.result), arguments.output)
    return _print_and_push(arguments, report, describe_adapter(report))


def _print_and_push(arguments: argparse.Namespace, report: ExportReport | AdapterReport, text: str) -> int:
    """Print what was written, after it was uploaded where that was asked for."""
    if arguments.push is None:
        return print_result(arguments, to_json(report), text)
    from finetune.hub.uploads import describe_push
    from finetune.pipeline.push import push_result

    try:
        pushed = push_result(report.output, arguments.push, public=arguments.public)
    except FinetuneError as error:
        again = f"finetune push {report.output} {arguments.push}"
        raise HubError(f"{error}\n{report.output} is written; upload it later with `{again}`") from error
    return print_result(arguments, {**to_json(report), "push": to_json(pushed)}, f"{text}\n{describe_push(pushed)}")


def run_push(arguments: argparse.Namespace) -> int:
    from finetune.hub.uploads import describe_push
    from finetune.pipeline.push import push_result

    report = push_result(arguments.path, arguments.repository, public=arguments.public)
    return print_result(arguments, to_json(report), describe_push(report))


def run_average(arguments: argparse.Namespace) -> int:
    from finetune.exporting.averaging import average_models, describe_average

    report = average_models(arguments.models, arguments.output, arguments.dtype, arguments.max_shard_size)
    return print_result(arguments, to_json(report), describe_average(report))


def run_gguf(arguments: argparse.Namespace) -> int:
    from finetune.exporting.gguf.conversion import convert_folder, describe_gguf
    from finetune.runs.export_settings import check_gguf_type

    check_gguf_type(arguments.type)
    prover, verifies = _make_prover(arguments), not arguments.no_verify
    report = convert_folder(arguments.folder, arguments.output, arguments.type, prover, verify=verifies)
    return print_result(arguments, to_json(report), describe_gguf(report))


def _make_prover(arguments: argparse.Namespace) -> LlamaCppProver | None:
    """Return what runs GGUF files in llama.cpp, where a binding is installed."""
    from finetune.exporting.proof import has_binding

    if arguments.no_verify or not has_binding():
        return None
    from finetune.exporting.gguf.llama_cpp import LlamaCppProver

    return LlamaCppProver()


def run_chat(arguments: argparse.Namespace) -> int:
    from finetune.models.opening import open_model

    loaded = open_model(arguments.model)
    history = [{"role": "system", "content": arguments.system}] if arguments.system else []

    def reply(text: str) -> Any:
        messages = [*history, {"role": "user", "content": text}]
        return loaded.answer(messages, arguments.max_new_tokens, arguments.temperature)

    if arguments.prompt is not None:
        result = reply(arguments.prompt)
        return print_result(
            arguments, {"answer": result.text, "tokens": result.tokens, "stopped_by": result.stopped_by}, result.text
        )
    print("Press Ctrl-D to end the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return SUCCESS
        if text:
            result = reply(text)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
            print(escape_controls(result.text))


def run_demo(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging

    from finetune.pipeline.demo import describe_demo, run_demo

    transformers_logging.disable_progress_bar()  # otherwise each of the six loads of a tiny model shows a bar
    result = run_demo(arguments.output)
    return print_result(arguments, to_json(result), describe_demo(result))
