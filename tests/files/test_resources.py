"""Shipped recipes are found by their names from anywhere; a person's own file of that name wins."""

from pathlib import Path

import pytest

from finetune.files.resources import find_recipe, list_all_recipes


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "recipes/{}.yaml", "recipes/{}"])
@pytest.mark.parametrize("name", ["sft_qlora", "tiers/8gb"])
def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path(form.format(name))) == list_all_recipes()[name]


@pytest.mark.parametrize("asked", ["sft_qlora", "sft_qlora.yaml"])
def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    Path("sft_qlora.yaml").write_text("seed: 1\n")
    assert find_recipe(Path(asked)) == Path("sft_qlora.yaml")


@pytest.mark.parametrize("asked", [".", "..", "nosuch", "/nosuch/sft_qlora", "elsewhere/sft_qlora.yaml", "8gb"])
def test_anything_else_is_what_it_says(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft_qlora").mkdir()  # a run directory is no recipe
    assert find_recipe(Path(asked)) == Path(asked)
