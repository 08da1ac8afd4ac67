"""An option that the kit sets itself is refused in a recipe, before any library is given it twice."""

import importlib

import pytest
import torch

from finetune.check.recipes import load_recipe, resolve_names
from finetune.compat import load_trainer_class
from finetune.errors import RecipeError
from finetune.models.precision import Precision
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe
from finetune.training.trainer import make_config


class Called(Exception):  # noqa: N818 - it is no error
    """Carries the arguments that a configuration class was called with."""


@pytest.fixture
def collect_options(monkeypatch):
    """Return the options that a method's configuration class gets for a recipe, or None where it gets one twice."""

    def collect(method, trainer):
        load_trainer_class(method.config_module, method.config_class)

        def record(**options):
            raise Called(options)

        monkeypatch.setattr(importlib.import_module(method.config_module), method.config_class, record)
        resolved = resolve_names(Recipe(method=method.name, trainer=trainer))
        try:
            make_config(resolved, True, Precision(torch.float32, "no"))
        except Called as called:
            return called.args[0]
        except RecipeError as error:
            assert "multiple values" in str(error)
        return None

    return collect


@pytest.mark.parametrize("name", METHODS)
def test_options_that_the_kit_sets_are_refused_in_a_recipe(name, collect_options):
    method = METHODS[name]
    options = collect_options(method, {})
    owned = {key for key, value in options.items() if collect_options(method, {key: value}) is None}
    assert {"output_dir", "logging_nan_inf_filter"} <= owned
    assert owned - set(method.owned) == set()


def test_the_message_says_what_the_kit_does_instead(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: recipe.yaml}\ntrainer: {logging_nan_inf_filter: true}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert caught.value.problems == [
        "trainer.logging_nan_inf_filter: the log shows every loss as it is, so that a NaN is seen; remove this key"
    ]
