"""Print results: text for a person, or one JSON object."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from finetune.cli.libraries import is_main_process

if TYPE_CHECKING:
    from finetune.check.chain_stages import Chain, TrainStage


SUCCESS, USER_ERROR, INTERRUPTED = 0, 2, 130


def print_each(arguments: argparse.Namespace, chain: Chain, look: Callable[[TrainStage], tuple[Any, str]]) -> int:
    """Call `look` for every stage that trains, and print the results."""
    if chain.single is not None:
        return print_result(arguments, *look(chain.single))
    found = {stage.name: look(stage) for stage in chain.trainings}
    result = {"stages": {name: result for name, (result, _) in found.items()}}
    return print_result(arguments, result, "\n\n".join(f"stage {name}\n\n{text}" for name, (_, text) in found.items()))


def print_result(arguments: argparse.Namespace, result: Any, text: str) -> int:
    if is_main_process():
        print(json.dumps(result, ensure_ascii=False) if arguments.json else text)
    return SUCCESS


def to_json(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value), default=str))
