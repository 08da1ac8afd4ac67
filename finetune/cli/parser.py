"""Build the parser of the command line from the table of verbs."""

import argparse
from collections.abc import Sequence
from typing import Any

from finetune.cli.verbs import VERBS, Verb
from finetune.files.version import read_version


class _PrintVersion(argparse.Action):
    """Print the version; reading it takes as long as the rest of `--help`, so it is read only here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print(f"yulan-finetune {read_version()}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs; the parsed arguments hold the function of the verb as `run`, and the table as `verbs`."""
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune YuLan-Mini from any of its published checkpoints, and export verified Llama-format models.",
        epilog="Start with: finetune demo",
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version")
    parser.set_defaults(verbs=VERBS)  # for the verb that lists them all
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        _add_verb(parsers, verb)
    return parser


def _add_verb(parsers: "argparse._SubParsersAction[argparse.ArgumentParser]", verb: Verb) -> None:
    parser = parsers.add_parser(
        verb.name,
        help=verb.help,
        description=verb.help,
        epilog="\n  ".join(["examples:", *verb.examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=verb.run)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    verb.add_arguments(parser)
