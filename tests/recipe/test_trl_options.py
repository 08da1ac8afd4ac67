"""The options that are read from TRL's sources are those of its classes."""

import dataclasses
import importlib

import pytest

from finetune.compat import prepare_trl
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import ACCUMULATION, BATCH, DEFAULT_BATCH
from finetune.recipe.trl_options import read_trainer_options

PLAIN = (int, float, str, bool)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_class(name):
    """TRL's 512 tokens of an answer were written twice in the kit."""
    prepare_trl()  # which silences the warning of the experimental namespace
    method = METHODS[name]
    options = read_trainer_options(method.config_module, method.config_class)
    config_class = getattr(importlib.import_module(method.config_module), method.config_class)
    plain = {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.init and type(field.default) in PLAIN and field.name != "optim"  # which follows from the torch
    }
    assert {key: options[key].default for key in plain} == plain
    assert (plain[BATCH], plain[ACCUMULATION]) == (DEFAULT_BATCH, 1)
