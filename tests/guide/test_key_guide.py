"""Every key has a sentence, every sentence a key, and docs/keys.md is what they make."""

import dataclasses
from pathlib import Path

import pytest

from finetune.data.formats.row_formats import FORMATS
from finetune.guide.key_guide import render_key_guide
from finetune.guide.recipe_keys import (
    list_chain_keys,
    list_endpoint_keys,
    list_export_keys,
    list_recipe_keys,
    list_source_keys,
    list_task_keys,
    walk_keys,
)
from finetune.recipe.batches import KIT_OPTIONS
from finetune.recipe.key_texts import KEYS
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe
from finetune.recipe.yaml_loader import parse_yaml
from finetune.rewards.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
ALL = [
    key
    for keys in (
        list_recipe_keys(),
        list_source_keys(),
        list_task_keys(),
        list_endpoint_keys(),
        list_chain_keys(),
        list_export_keys(),
    )
    for key in walk_keys(keys)
]


def list_names(value, prefix=""):
    """Yield the names of a section's fields, found by the values of its defaults rather than by its types."""
    for name, inner in vars(value).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(inner):
            yield from list_names(inner, f"{prefix}{name}.")


def test_every_key_has_a_text_and_every_text_a_key():
    names = [key.name for key in ALL]
    assert sorted(names) == sorted(KEYS)
    assert {*list_names(Recipe()), *(f"trainer.{option}" for option in KIT_OPTIONS)} <= set(names)


@pytest.mark.parametrize("key", ALL, ids=lambda key: key.name)
def test_texts_are_sentences(key):
    assert key.text[-1] == "." and len(key.text) <= 300
    assert key.text[0].isupper() or key.text.split()[0] in {*key.values, key.short_name, "default", "lora", "llama"}


@pytest.mark.parametrize("key", [key for key in ALL if key.default], ids=lambda key: key.name)
def test_defaults_are_those_of_the_sections(key):
    section, _, name = key.name.rpartition(".")
    if section in ("source", "task", "endpoint", "export", "trainer"):
        return
    value = Recipe()
    for part in section.split(".") if section else ():
        value = getattr(value, part)
    expected = getattr(value, name)
    found = parse_yaml(key.default, key.name)
    assert (tuple(found) if isinstance(expected, tuple) else found) == expected


def test_choices_are_complete():
    values = {key.name: key.values for key in ALL}
    assert set(values["data.format"]) == {"auto", *FORMATS} and len(FORMATS) == 11
    assert set(values["method"]) == set(METHODS)
    assert values["data.train_on"] == ("assistant", "last", "all")


def test_the_page_is_what_the_keys_make():
    """Run `make keys` after a change."""
    assert PAGE.read_text(encoding="utf-8") == render_key_guide()


def test_the_page_holds_rules_formats_and_owned_options():
    page = render_key_guide()
    assert all(f"| `{rule.name}` | {rule.description} |" in page for rule in RULES.values())
    assert all(f"| `{name}` | " in page for name in [*FORMATS, *METHODS])
    for method in METHODS.values():
        assert f"`{method.config_class}`" in page
        for option, reason in method.owned.items():
            rows = [line for line in page.splitlines() if f"`{option}`" in line]
            assert any(reason.split("<")[0] in row and (method.name in row or "| all |" in row) for row in rows)
