"""Print results: text for a person, or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from finetune.files.launcher import is_main_process
from finetune.files.terminal import escape_controls, escape_json

if TYPE_CHECKING:
    from finetune.check.chain_stages import Chain, TrainStage


SUCCESS, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def print_each(arguments: argparse.Namespace, chain: Chain, look: Callable[[TrainStage], tuple[Any, str]]) -> int:
    """Call `look` for every stage that trains, and print the results."""
    if chain.single is not None:
        return print_result(arguments, *look(chain.single))
    found = {stage.name: look(stage) for stage in chain.trainings}
    result = {"stages": {name: result for name, (result, _) in found.items()}}
    return print_result(arguments, result, "\n\n".join(f"stage {name}\n\n{text}" for name, (_, text) in found.items()))


def print_result(arguments: argparse.Namespace, result: Any, text: str) -> int:
    if is_main_process():
        if arguments.json:
            # A console that cannot show every character gets escapes, which are JSON too, instead of question marks.
            shows_all = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")
            print(escape_json(json.dumps(result, ensure_ascii=not shows_all)))
        else:
            print(escape_controls(text, keeps_colour=True))
    return SUCCESS


def to_json(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value), default=str))
