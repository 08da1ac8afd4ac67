"""List the shipped recipes: the method, the trained weights and the hardware that each needs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.check.chains import load_chain
from finetune.files.resources import list_all_recipes
from finetune.guide.recipe_keys import STAGES
from finetune.recipe.recipe_file import read_recipe
from finetune.recipe.sections import Recipe
from finetune.recipe.yaml_loader import load_recipe_file

# The second line of a shipped recipe says what it needs.
_NEEDS = re.compile(r"^# Needs: (.+)$", re.MULTILINE)
_BASES = {"none": "", "int8": " on an 8-bit base", "nf4": " on a 4-bit base"}


@dataclass(frozen=True)
class ShippedRecipe:
    """A shipped recipe; `method` and `trains` are read from its keys, `needs` from its comment."""

    name: str
    method: str
    trains: str
    needs: str


def list_shipped_recipes() -> tuple[ShippedRecipe, ...]:
    """Return every shipped recipe; those for each size of GPU come last."""
    return tuple(_read_shipped(name, path) for name, path in list_all_recipes().items())


def describe_shipped_recipes(recipes: Iterable[ShippedRecipe]) -> str:
    """Return the recipes as a table."""
    rows = [
        ("recipe", "method", "trains", "needs"),
        *((row.name, row.method, row.trains, row.needs) for row in recipes),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "Copy one with all keys: finetune recipes NAME -o my.yaml"])


def _read_shipped(name: str, path: Path) -> ShippedRecipe:
    needs = _NEEDS.search(path.read_text(encoding="utf-8"))
    recipes = _read_stages(path)
    return ShippedRecipe(
        name=name,
        method=", then ".join(recipe.method for recipe in recipes),
        trains=_describe_training(recipes[0]),
        needs=needs.group(1).rstrip(".") if needs is not None else "",
    )


def _read_stages(path: Path) -> list[Recipe]:
    if STAGES in load_recipe_file(path):
        return [stage.recipe for stage in load_chain(path).trainings]
    return [read_recipe(path).recipe]


def _describe_training(recipe: Recipe) -> str:
    trained = "all weights" if recipe.adapter.kind == "none" else f"LoRA (rank {recipe.adapter.rank})"
    architecture = ", native architecture" if recipe.model.architecture == "native" else ""
    base = _BASES[recipe.model.quantize]
    if recipe.model.stream_layers:
        base = f"{base or ' on a base'} in main memory"
    return f"{trained}{base}{architecture}"
