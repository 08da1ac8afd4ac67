"""A copy of a shipped recipe means the same anywhere, and every commented key of it can be set by itself."""

import json
import re

import pytest

from finetune.cli.main import main
from finetune.files.resources import list_all_recipes
from finetune.guide.recipe_copy import copy_recipe
from finetune.recipe.key_texts import KEYS
from finetune.recipe.recipe_file import list_keys, read_recipe
from finetune.recipe.yaml_loader import load_recipe_file, parse_yaml

RECIPES = list_all_recipes()
SINGLE = [name for name, path in RECIPES.items() if "stages" not in load_recipe_file(path)]
KEY_LINE = re.compile(r"^(\s*)#(\w+):", re.MULTILINE)


def check(capsys, recipe):
    with pytest.raises(SystemExit) as ended:
        main(["check", str(recipe), "--json"])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)["recipe"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_elsewhere_resolves_to_the_same_recipe(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "elsewhere" / RECIPES[name].name  # whose name is that of the default output
    copy.parent.mkdir()
    copy.write_text(copy_recipe(RECIPES[name]), encoding="utf-8")
    assert check(capsys, copy) == check(capsys, name)


@pytest.mark.parametrize("name", SINGLE)
def test_the_lines_of_the_recipe_stay(name):
    """But for the paths of bundled rows, and the keys in between."""
    original = [line for line in RECIPES[name].read_text(encoding="utf-8").splitlines() if "data/" not in line]
    copied = iter(copy_recipe(RECIPES[name]).splitlines())
    assert [line for line in original if line not in copied] == []


@pytest.mark.parametrize("name", SINGLE)
def test_every_key_stands_in_it(name):
    text = copy_recipe(RECIPES[name])
    everything = KEY_LINE.sub(r"\1\2:", text)
    given = set(list_keys(parse_yaml(everything, "copy")))
    own = {key for key in KEYS if key.split(".")[0] not in ("source", "task", "endpoint", "stages", "export")}
    assert own <= given


@pytest.mark.parametrize("name", SINGLE)
def test_any_one_commented_key_can_be_set(tmp_path, name):
    """To its default, so that the recipe is the same as before."""
    text, path = copy_recipe(RECIPES[name]), tmp_path / "copy.yaml"
    path.write_text(text, encoding="utf-8")
    before = read_recipe(path)
    places = list(KEY_LINE.finditer(text))
    assert before.problems == () and len(places) > 20
    for place in places:
        path.write_text(text[: place.start()] + place.expand(r"\1\2:") + text[place.end() :], encoding="utf-8")
        draft = read_recipe(path)
        assert draft.problems == ()
        assert len(draft.given) > len(before.given)
        kit = {"auto": False, "global_batch": 32}
        trainer = {key: value for key, value in draft.recipe.trainer.items() if kit.get(key) != value}
        assert trainer == before.recipe.trainer
        assert {**vars(draft.recipe), "trainer": trainer} == {**vars(before.recipe), "trainer": trainer}


def test_only_bundled_files_become_absolute(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {train: [rows.jsonl, mine.jsonl], system: rows}\noutput: runs\n")
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "runs").mkdir()
    text = copy_recipe(tmp_path / "mine.yaml")
    assert f"train: [{tmp_path / 'rows.jsonl'}, mine.jsonl], system: rows" in text
    assert "\noutput: runs\n" in text


def test_a_path_with_spaces_is_quoted(tmp_path):
    folder = tmp_path / "my rows, {old}: 1"
    folder.mkdir()
    (folder / "mine.yaml").write_text("data: {train: rows.jsonl}\n")
    (folder / "rows.jsonl").touch()
    (folder / "copy.yaml").write_text(copy_recipe(folder / "mine.yaml"))
    assert load_recipe_file(folder / "copy.yaml")["data"]["train"] == str(folder / "rows.jsonl")


def test_a_chain_explains_its_export(tmp_path):
    text = copy_recipe(RECIPES["instruct"])
    for key in ("dtype: auto", "max_shard_size: 2GB", "base: full", "verify: true"):
        assert f"\n#   {key}\n" in text
