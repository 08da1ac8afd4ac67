"""The verbs of the command line, with their arguments and help; what each does stands in `cli.py`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.mixtures.published import FIRST_PHASE, LAST_PHASE

Verb = Callable[[argparse.Namespace], int]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
_RUN_OR_MODEL = "a run directory, or an alias, a hub id or a folder"


def make_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """Return the parser of all verbs; `verbs` holds the function of each, found as `run` in what is parsed."""
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune YuLan-Mini from any of its published checkpoints, and export verified Llama-format models.",
        epilog="Start with: finetune demo",
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (text, add_arguments) in _VERBS.items():
        verb = parsers.add_parser(name, help=text, description=text)
        verb.set_defaults(run=verbs[name])
        verb.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output and nothing else"
        )
        add_arguments(verb)
    return parser


def _add_nothing(verb: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def _add_checkpoints(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--states", type=Path, metavar="FOLDER", help="show the optimizer states that a folder holds")


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe file")
    verb.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")


def _add_writing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    verb.add_argument("--dtype", choices=_DTYPES, default="auto", help="type of the weights (default: as stored)")
    verb.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="largest weight file (default: 2GB)")


def _add_mixtures(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--datasets", action="store_true", help="the open data sets that were used, with their addresses")
    verb.add_argument("--phase", type=_read_phase, metavar="N", help="one phase, with its data sets")
    verb.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the categories over all phases (.png, .svg, .pdf)"
    )


def _read_phase(text: str) -> int:
    if not text.isdecimal() or not FIRST_PHASE <= int(text) <= LAST_PHASE:
        raise argparse.ArgumentTypeError(f"must be a phase from {FIRST_PHASE} to {LAST_PHASE}; found {text!r}")
    return int(text)


def _add_fold(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="an alias, a hub id with an optional @revision, or a folder"
    )
    _add_writing(verb)


def _add_preview(verb: argparse.ArgumentParser) -> None:
    _add_recipe(verb)
    verb.add_argument("-n", "--rows", type=_read_count, default=3, metavar="N", help="how many rows (default: 3)")
    verb.add_argument("--html", type=Path, metavar="FILE", help="also write them as one page that needs nothing else")


def _add_lint(verb: argparse.ArgumentParser) -> None:
    _add_recipe(verb)
    verb.add_argument(
        "--fix", type=Path, metavar="DIR", help="write the rows that pass, as they are, into a new or empty folder"
    )


def _add_plan(verb: argparse.ArgumentParser) -> None:
    _add_recipe(verb)
    verb.add_argument("--memory", metavar="SIZE", help="say whether it fits a GPU of this memory, such as 8GB")
    verb.add_argument("--gpu", metavar="NAME", help='say whether it fits this card, such as "RTX 4060 Laptop"')
    verb.add_argument("--processes", type=_read_count, metavar="N", help="plan for one of so many processes")
    verb.add_argument("--engine", choices=_ENGINES, help="what shares their work (default: ddp)")
    verb.add_argument("--accelerate", type=Path, metavar="FILE", help="read both from accelerate's configuration")
    verb.add_argument(
        "--fit", action="store_true", help="change settings until it fits, and say what each change saves"
    )


def _add_train(verb: argparse.ArgumentParser) -> None:
    _add_recipe(verb)
    verb.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the recipe's output")
    verb.add_argument("--force", action="store_true", help="train also what the plan says cannot fit this GPU")


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("result", metavar="RUN", type=Path, help="a run directory, or an adapter folder that PEFT wrote")
    _add_writing(verb)
    verb.add_argument(
        "--base",
        choices=("full", "dequantized", "auto"),
        default="full",
        help="what the adapter of a quantized run is merged into (default: full); auto takes the lower held-out loss",
    )
    verb.add_argument("--no-verify", action="store_true", help="skip reopening and comparing")


def _add_evaluate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="RUN_OR_MODEL", help=_RUN_OR_MODEL)
    verb.add_argument("--data", type=Path, required=True, nargs="+", metavar="FILE", help="rows to evaluate on")
    verb.add_argument(
        "--max-tokens", type=_read_count, default=2048, metavar="N", help="leave longer rows out (default: 2048)"
    )


def _add_chat(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="RUN_OR_MODEL", help=_RUN_OR_MODEL)
    verb.add_argument("--prompt", metavar="TEXT", help="answer once and stop")
    verb.add_argument("--system", metavar="TEXT", help="a system line")
    verb.add_argument(
        "--max-new-tokens", type=_read_count, default=512, metavar="N", help="longest answer (default: 512)"
    )
    verb.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )


def _add_demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-o", "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")


def _read_count(text: str) -> int:
    """Read a whole number above 0; argparse turns the error into its usual message and exit status 2."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; found {text!r}")
    return int(text)


_VERBS: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "checkpoints": ("list what one can start from", _add_checkpoints),
    "mixtures": ("show what the authors trained on, phase by phase", _add_mixtures),
    "fold": ("write the exact Llama form of a checkpoint", _add_fold),
    "check": ("check a recipe without loading anything", _add_recipe),
    "preview": ("show rows as the model will see them, with what is trained marked", _add_preview),
    "lint": ("look for what is wrong with the rows: duplicates, empty answers, overlap and more", _add_lint),
    "plan": ("predict memory and time of a training step, without a GPU and without weights", _add_plan),
    "doctor": ("what this machine has, and what the kit will therefore use", _add_nothing),
    "train": ("train, and leave a run directory", _add_train),
    "export": ("merge a run into Llama-format weights, and prove that they are right", _add_export),
    "evaluate": ("loss, perplexity and token accuracy on held-out rows", _add_evaluate),
    "chat": ("talk to a run or a model", _add_chat),
    "demo": ("the whole line in miniature: train, export, verify, answer", _add_demo),
}
