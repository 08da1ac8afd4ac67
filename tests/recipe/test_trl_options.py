"""The options that are read from TRL's sources are those of its classes."""

import dataclasses

import pytest

from finetune.compat import load_trainer_class
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import ACCUMULATION, BATCH
from finetune.recipe.sections import Recipe
from finetune.recipe.trl_options import read_trainer_options

PLAIN = (int, float, str, bool)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_class(name):
    """TRL's 512 tokens of an answer were written twice in the kit."""
    method = METHODS[name]
    options = read_trainer_options(method.config_module, method.config_class)
    config_class = load_trainer_class(method.config_module, method.config_class)
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.init and field.name != "optim"  # which follows from the torch
    }
    plain = {key: default for key, default in defaults.items() if type(default) in PLAIN}
    assert {key: options[key].default for key in plain} == plain
    assert {options[key].default for key in defaults.keys() - plain.keys()} == {None}
    recipe = Recipe(method=name)
    assert (plain[BATCH], plain[ACCUMULATION]) == (read_batch(recipe), read_accumulation(recipe)) == (8, 1)
