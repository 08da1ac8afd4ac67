"""The recipes for cards of every size: as their script writes them, and fitting by their plan."""

import importlib.util
import json
from pathlib import Path

import pytest

from finetune.check.recipes import load_recipe
from finetune.planning.forecast import Target, make_plan

ROOT = Path(__file__).parents[2]
RECORDS = {row["tier"]: row for row in json.loads((ROOT / "benchmarks" / "tiers.json").read_text(encoding="utf-8"))}
FILES = sorted((ROOT / "recipes" / "tiers").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiers():
    """The table of the script that wrote them."""
    spec = importlib.util.spec_from_file_location("tiers", ROOT / "benchmarks" / "tiers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {tier.name: (tier, module) for tier in module.TIERS}


def test_every_tier_has_its_recipe_and_its_record(tiers):
    assert [path.stem for path in FILES] == sorted(tiers) == sorted(RECORDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipes_are_those_that_were_planned(tiers, path):
    """A changed recipe has no figures until the script has run again."""
    tier, module = tiers[path.stem]
    text, record = path.read_text(encoding="utf-8"), RECORDS[path.stem]
    assert text == record["recipe"] == module.write_recipe(tier)
    assert len(text.splitlines()) <= 30
    assert load_recipe(path).recipe.data.max_tokens == record["tokens"]
    assert sum(record["parts"].values()) == record["peak_bytes"] <= record["memory_bytes"]
    assert f"`tiers/{path.name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_the_smallest_card_fits_as_recorded(tiers):
    record = RECORDS["4gb"]
    plan = make_plan(load_recipe(ROOT / "recipes" / "tiers" / "4gb.yaml"), Target(True, record["memory_bytes"]))
    assert plan.fits
    assert plan.peak_bytes == pytest.approx(record["peak_bytes"], rel=0.001)
