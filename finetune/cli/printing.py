"""Print results: text for a person, or one JSON object."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from finetune.cli.libraries import is_main_process

if TYPE_CHECKING:
    from finetune.check.chain_stages import Chain
    from finetune.recipe.sections import Recipe


SUCCESS, USER_ERROR, INTERRUPTED = 0, 2, 130


def open_chain(arguments: argparse.Namespace) -> Chain | None:
    from finetune.check.chains import is_chain, load_chain

    return load_chain(arguments.recipe, arguments.set) if is_chain(arguments.recipe) else None


def load_recipes(arguments: argparse.Namespace, chain: Chain | None) -> Mapping[str, Recipe]:
    """Return the recipe under an empty name, or those of a chain under the names of their stages."""
    from finetune.check.recipes import load_recipe

    if chain is not None:
        return {stage.name: stage.recipe for stage in chain.trainings}
    return {"": load_recipe(arguments.recipe, arguments.set)}


def print_each(
    arguments: argparse.Namespace,
    look: Callable[[Recipe, str], tuple[Any, str]],
    recipes: Mapping[str, Recipe] | None = None,
) -> int:
    """Look at a recipe, or at every stage of a chain, and print what each gives."""
    found = {
        name: look(recipe, name) for name, recipe in (recipes or load_recipes(arguments, open_chain(arguments))).items()
    }
    if "" in found:
        return print_result(arguments, *found[""])
    result = {"stages": {name: result for name, (result, _) in found.items()}}
    return print_result(arguments, result, "\n\n".join(f"stage {name}\n\n{text}" for name, (_, text) in found.items()))


def print_result(arguments: argparse.Namespace, result: Any, text: str) -> int:
    if is_main_process():
        print(json.dumps(result, ensure_ascii=False) if arguments.json else text)
    return SUCCESS


def to_json(value: Any) -> Any:
    return json.loads(json.dumps(asdict(value), default=str))
