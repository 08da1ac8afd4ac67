"""The recipe loader: strict YAML, every problem at once, precedence, round trip."""

import dataclasses
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.files.resources import find_recipe
from finetune.recipe.recipe_file import read_recipe
from finetune.recipe.sections import AdapterSection, Recipe, dump_recipe


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def read(path, *overrides):
    draft = read_recipe(path, overrides)
    assert draft.problems == ()
    return draft.recipe


def test_defaults_then_file_then_overrides(write):
    path = write("adapter: {rank: 8, alpha: 20}\n")
    assert read(path).adapter == AdapterSection(rank=8, alpha=20)
    assert read(path, "adapter.rank=4").adapter == AdapterSection(rank=4, alpha=20)
    assert read(write("seed: 1\n"), "adapter.rank=4").adapter == AdapterSection(rank=4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),  # YAML 1.1 reads this as text
        ("1E5", 1e5),
        (".5", 0.5),
        ("1_000", 1000),
        ("no", "no"),  # YAML 1.1 reads these as false and true
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("010", 10.0),  # YAML 1.1 reads this as eight
        ("12:30", "12:30"),  # YAML 1.1 reads this as 750
        ("'2e-4'", "2e-4"),
    ],
)
def test_scalars_mean_what_people_write(write, text, value):
    found = read(write(f"trainer: {{x: {text}}}\n")).trainer["x"]
    assert found == value
    assert type(found) is type(value)


def test_one_value_may_stand_for_a_list(write):
    recipe = read(write("data: {train: a.jsonl}\nadapter: {train_tokens: 104, targets: [q_proj, v_proj]}\n"))
    assert recipe.data.train == ("a.jsonl",)
    assert recipe.adapter.train_tokens == (104,)
    assert recipe.adapter.targets == ("q_proj", "v_proj")


def test_every_problem_is_listed_at_once(write):
    draft = read_recipe(
        write(
            "methud: sft\n"
            "model: {quantise: nf4, quantize: int4}\n"
            "data: 3\n"
            "adapter: {rank: 1.5, dora: yes, train_tokens: [104, x], alpha: true}\n"
            "seed: '7'\n"
        )
    )
    assert draft.problems == (
        "methud: unknown key; did you mean 'method'?",
        "model.quantise: unknown key; did you mean 'quantize'?",
        "model.quantize: must be one of none, int8, nf4; found 'int4'",
        "data: must be a section of keys and values; found 3",
        "adapter.rank: must be a whole number; found 1.5",
        "adapter.dora: must be true or false; found 'yes'",
        "adapter.train_tokens: must be a whole number, or a list of such; found 'x' as entry 2 of the list",
        "adapter.alpha: must be a number; found true",
        "seed: must be a whole number; found '7'",
    )


@pytest.mark.parametrize(
    ("tasks", "found"),
    [
        ("[null]", "nothing as entry 1 of the list"),
        ("[lambada, 3]", "3 as entry 2 of the list"),
        ("[[lambada]]", "a list of 1 as entry 1 of the list"),
        ("null", "nothing"),
        ("true", "true"),
    ],
)
def test_a_wrong_entry_of_a_list_is_named(write, tasks, found):
    """`tasks: [null]` was refused with "found a list of 1", and the form with keys was not named."""
    draft = read_recipe(write(f"data: {{train: a.jsonl, tasks: {tasks}}}\n"))
    assert draft.problems == (
        f"data.tasks: must be text or a section of keys and values, or a list of such; found {found}",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nseed: 2\n", "line 2, column 1: the key 'seed' stands twice, in lines 1 and 2"),
        ("model:\n  dtype: auto\n  dtype: auto\n", "line 3, column 3: the key 'dtype' stands twice, in lines 2 and 3"),
        ("a: [1\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("- 1\n", "must hold keys and values; found a list of 1"),
        ("", "the file is empty; a recipe needs at least data.train"),
        ("1: 2\n", "line 1, column 1: the key 1 is not a word"),
        (
            "a: !!python/object:os.system x\n",
            "line 1, column 4: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("a: &x 1\nb: *y\n", "line 2, column 4: found undefined alias 'y'"),
    ],
)
def test_what_is_no_recipe_is_refused(write, text, problem):
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(text))
    assert caught.value.problems == [problem]


def test_a_missing_file_names_its_neighbours(write, tmp_path):
    write("seed: 1\n")
    with pytest.raises(RecipeError, match=r"there is no such file; .* holds recipe.yaml"):
        read_recipe(tmp_path / "recipes.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"seed: \xff\n")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 6\)"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "--set seed: must read section.key=value, such as model.quantize=nf4"),
        ("seed.x=1", "--set seed.x=1: 'seed' is not a section"),
        ("model.quant=nf4", "model.quant: unknown key; did you mean 'quantize'?"),
    ],
)
def test_overrides_are_checked_like_the_file(write, override, problem):
    assert read_recipe(write("seed: 1\n"), [override]).problems == (problem,)


def test_a_dumped_recipe_reads_back_equal(write):
    recipe = read(write("data: {train: [a, b], columns: {prompt: q}, held_out: 0.1}\ntrainer: {learning_rate: 2e-4}\n"))
    assert read(write(dump_recipe(recipe))) == recipe
    assert read(write(dump_recipe(Recipe()))) == Recipe()


def test_sections_stay_few():
    own = sum(
        len(dataclasses.fields(field.default_factory))
        for field in dataclasses.fields(Recipe)
        if dataclasses.is_dataclass(field.default_factory)
        and field.name not in ("clean", "synthesize")  # no key of it belongs to training
    )
    assert own <= 56


def test_a_glob_on_the_command_line_is_a_word(tmp_path):
    (tmp_path / "r.yaml").write_text("data: {train: a.jsonl}\n", encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml", ["data.train=*.jsonl"]).recipe.data.train == ("*.jsonl",)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["schedule.length", "optimizer.learning_rate", "model.rope_theta"])
def test_numbers_are_finite(write, key, value):
    """An infinite length was a traceback, and a rate that is no number was fine."""
    (problem,) = read_recipe(write("seed: 1\n"), [f"{key}={value}"]).problems
    assert problem.startswith(f"{key}: must be ") and "number" in problem


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("sft_qlra", "there is no such file; did you mean the shipped recipe 'sft_qlora'?"),
        ("sft-qlora.yaml", "there is no such file; did you mean the shipped recipe 'sft_qlora'?"),
        ("recipes/sft_qlra.yaml", "there is no such file; did you mean the shipped recipe 'sft_qlora'?"),
        ("tiers/8g", "there is no such file; did you mean the shipped recipe 'tiers/8gb'?"),
        (".", "is a folder; name a recipe"),
        ("my_recipe", "there is no such file; . holds no recipes (`finetune recipes` lists the shipped ones)"),
        ("nowhere/zzz.yaml", "there is no such file (the folder nowhere does not exist either)"),
    ],
)
def test_a_missing_file_names_a_shipped_recipe(tmp_path, monkeypatch, asked, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        read_recipe(Path(asked))
    assert caught.value.problems == [problem]


def test_ones_own_recipes_are_named_beside_the_shipped_one(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("seed: 1\n")
    with pytest.raises(RecipeError, match=r"did you mean the shipped recipe 'sft_qlora'\? \. holds recipe.yaml$"):
        read_recipe(Path("sft_qlra"))
    # A run directory holds a recipe; "there is no such file" was said of it.
    with pytest.raises(RecipeError, match=r"is a folder; name a recipe, such as .*recipe\.yaml$"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("text", ["adapter:\n", "adapter:\n  # rank: 8\n", "rewards:\n  judge:\n", "trainer:\n"])
def test_a_section_with_nothing_in_it_says_nothing(write, text):
    draft = read_recipe(write(f"seed: 42\n{text}"))
    assert (draft.recipe, draft.problems) == (Recipe(), ())
    assert not {"adapter", "trainer", "rewards.judge"} & draft.given


@pytest.mark.parametrize("text", ["seed: 2001-13-45\n", f"seed: {'9' * 5000}\n", f"seed: {'[' * 3000}\n"])
def test_yaml_that_no_recipe_can_hold_is_a_problem(tmp_path, text):
    """Each was a traceback."""
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="is not YAML that a recipe can hold"):
        read_recipe(tmp_path / "recipe.yaml")


def test_paths_that_cannot_be_read_are_problems(tmp_path):
    (tmp_path / "file").write_text("seed: 1\n", encoding="utf-8")
    for path in (tmp_path / "file" / "recipe.yaml", tmp_path / ("x" * 300)):
        with pytest.raises(RecipeError, match="cannot be read: "):
            read_recipe(find_recipe(path))
