"""The arguments of the verbs that answer a question with several small runs."""

import argparse
import re
from pathlib import Path

from finetune.cli.arguments import read_count
from finetune.cli.measuring.measuring_arguments import add_task_options, read_names
from finetune.files.folders import expand_home


def add_sweep(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "recipe", metavar="RECIPE", type=expand_home, help="a recipe file, or the name of a shipped recipe"
    )
    verb.add_argument(
        "-s",
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="try these values of a key, or set it to one; a value with commas needs brackets or quotes",
    )
    verb.add_argument(
        "--seeds",
        type=read_count,
        default=1,
        metavar="N",
        help="train each setting with N seeds, the recipe's and those after it (default: 1)",
    )
    verb.add_argument(
        "-o",
        "--output",
        type=expand_home,
        required=True,
        metavar="DIR",
        help="a new folder, or that of a stopped sweep",
    )


def add_microanneal(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--candidate", type=expand_home, nargs="+", required=True, metavar="FILE", help="the new data")
    verb.add_argument(
        "--share", type=float, default=0.3, metavar="S", help="its share of the tokens, between 0 and 1 (default: 0.3)"
    )
    verb.add_argument(
        "--mixture",
        metavar="PHASE",
        help="the old mixture, such as phase26; -s data.sources.NAME=FILE says which files are in it (default: data.train)",
    )
    verb.add_argument(
        "--from",
        dest="start",
        required=True,
        metavar="CHECKPOINT",
        help="what both runs begin with: an alias such as before-annealing, a hub id, a folder or a run",
    )
    verb.add_argument(
        "--tokens", type=_read_tokens, required=True, metavar="N", help="tokens of each run, such as 20M or 500K"
    )
    verb.add_argument(
        "-o", "--output", type=expand_home, required=True, metavar="DIR", help="a new folder, or that of a stopped call"
    )
    verb.add_argument(
        "--held-out",
        type=expand_home,
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows to compare the loss on, by file or by their key source (default: a part of every source, data.held_out)",
    )
    verb.add_argument(
        "--recipe", type=expand_home, default=Path("anneal"), metavar="RECIPE", help="how to train (default: anneal)"
    )
    verb.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of that recipe"
    )
    tuning = verb.add_argument_group("the same fine-tuning after both")
    tuning.add_argument("--sft", type=expand_home, metavar="RECIPE", help="a recipe to train from both results")
    tuning.add_argument(
        "--sft-set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe of --sft"
    )
    tuning.add_argument("--chat", action="store_true", help="ask the tuned models in their chat template")
    verb.add_argument(
        "--tasks", type=read_names, metavar="TASKS", help="tasks to evaluate both on, such as lambada,gsm8k,humaneval"
    )
    add_task_options(verb)


def _read_tokens(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB]?)", text.strip().upper())
    tokens = float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[found[2]] if found else 0
    if tokens < 1 or tokens != int(tokens):
        raise argparse.ArgumentTypeError(f"must be a number of tokens, such as 20M or 500K; found {text!r}")
    return int(tokens)
