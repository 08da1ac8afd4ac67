"""`--set section.key=value`: a text is taken to its end, and a path is relative to the current folder."""

import pytest

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.recipe.yaml_loader import read_override

ROW = '{"prompt": "Q", "completion": "A"}\n'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer # in one word", "Answer # in one word"),
        ("Rules: be brief", "Rules: be brief"),
        ("a: b: c # d", "a: b: c # d"),
        ("- not a list", "- not a list"),
        ("*.jsonl", "*.jsonl"),
        ("&a", "&a"),
        ("!x", "!x"),
        ("'quoted # text'", "quoted # text"),
        ('"a\\tb"', "a\tb"),
        ('"Hi" said he', '"Hi" said he'),
        (" 2e-4 ", 2e-4),
        ("7", 7),
        ("true", True),
        ("no", "no"),
        ("null", None),
        ("", None),
        ("[a, 'b # c']", ["a", "b # c"]),
        ("{prompt: question}", {"prompt": "question"}),
        ("=", "="),
        ("<<", "<<"),
        ("two\nlines: here", "two\nlines: here"),
    ],
)
def test_a_text_is_taken_to_its_end(tmp_path, text, value):
    """`#` and `: ` cut a text as YAML's comment or made a section of it."""
    assert read_override("data.system", text, tmp_path / "r.yaml") == value


@pytest.mark.parametrize("text", ["[INST] be brief", "{a: b", "9" * 5000])
def test_what_is_no_value_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match=r"data\.system"):
        read_override("data.system", text, tmp_path / "r.yaml")


def test_a_path_is_that_of_the_current_folder(tmp_path, monkeypatch):
    """A shipped recipe read the bundled file of the same name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("demo.jsonl", "pairs.jsonl"):
        (tmp_path / "data" / name).write_text(ROW, encoding="utf-8")
    own = str(tmp_path / "data" / "demo.jsonl")
    for given in (
        "./data/demo.jsonl",
        "data/demo.jsonl",
        "data/d*.jsonl",
        "[data/demo.jsonl]",
        "{path: data/demo.jsonl}",
    ):
        (found,) = load_recipe("sft_lora", [f"data.train={given}"]).recipe.data.train
        assert str(getattr(found, "path", found)).replace("d*", "demo") == own, given
    assert load_recipe(
        "sft_lora", ["data.train=./data/demo.jsonl", "data.eval=data", "data.held_out=0"]
    ).recipe.data.eval == (str(tmp_path / "data"),)


@pytest.mark.parametrize("given", ["./data/demo.jsonl", "data/demo.jsonl", "data/*.jsonl"])
def test_the_bundled_file_is_never_meant(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.train: .* does not exist"):
        load_recipe("sft_lora", [f"data.train={given}"])


def test_beside_a_persons_own_recipe_a_path_is_found_too(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "here").mkdir()
    for folder in ("own", "here"):
        (tmp_path / folder / "both.jsonl").write_text(ROW, encoding="utf-8")
    (tmp_path / "own" / "mine.jsonl").write_text(ROW, encoding="utf-8")
    recipe = tmp_path / "own" / "r.yaml"
    recipe.write_text("model: {checkpoint: nano}\ndata: {train: mine.jsonl}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe(recipe, ["data.train=both.jsonl"]).recipe.data.train == (str(tmp_path / "here" / "both.jsonl"),)
    assert load_recipe(recipe, ["data.train=mine.jsonl"]).recipe.data.train == (str(tmp_path / "own" / "mine.jsonl"),)
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(recipe, ["data.train=./mine.jsonl"])


def test_a_section_does_not_undo_what_is_set_in_it(tmp_path):
    """`trainer.auto=true` was applied before `trainer={...}`, which then replaced it without a word."""
    (tmp_path / "rows.jsonl").write_text(ROW, encoding="utf-8")
    (tmp_path / "r.yaml").write_text("data: {train: rows.jsonl}\nmodel: {checkpoint: nano}\n", encoding="utf-8")
    for overrides in (["trainer={max_steps: 2}", "trainer.auto=true"], ["trainer.auto=true", "trainer={max_steps: 2}"]):
        trainer = load_recipe(tmp_path / "r.yaml", overrides).recipe.trainer
        assert (trainer["auto"], trainer["max_steps"]) == (True, 2)
