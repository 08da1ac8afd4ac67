"""What the list of shipped recipes says stands in the recipes: their keys, and the comments at their top."""

import pytest

from finetune.files.resources import list_all_recipes
from finetune.guide.shipped_recipes import describe_shipped_recipes, list_shipped_recipes

RECIPES = list_all_recipes()


@pytest.mark.parametrize("path", RECIPES.values(), ids=list(RECIPES))
def test_recipes_begin_with_what_they_are_and_need(path):
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and first.endswith(".")
    assert second.startswith("# Needs: ") and second.endswith(".")


def test_the_list_tells_recipes_apart():
    rows = {row.name: row for row in list_shipped_recipes()}
    assert list(rows) == list(RECIPES)
    assert vars(rows["sft_qlora"]) == {
        "name": "sft_qlora",
        "method": "sft",
        "trains": "LoRA (rank 16) on a 4-bit base",
        "needs": "4.8 GiB of GPU memory (planned; an H100 allocated as much as planned)",
    }
    assert rows["instruct"].method == "sft, then dpo"
    assert rows["anneal"].trains == "all weights, native architecture"
    assert rows["tiers/4gb"].trains == "LoRA (rank 16) on a 4-bit base in main memory"
    assert rows["sft_full"].trains == "all weights"
    assert rows["demo"].needs == "any CPU"
    assert [name for name in rows if name.startswith("tiers/")][:3] == ["tiers/4gb", "tiers/6gb", "tiers/8gb"]
    text = describe_shipped_recipes(rows.values()).splitlines()
    assert text[0].split() == ["recipe", "method", "trains", "needs"]
    assert len(text) == len(rows) + 3
