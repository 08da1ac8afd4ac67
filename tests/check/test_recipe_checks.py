"""A recipe is checked against everything it names, without importing torch."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.check.chains import load_chain
from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.files.resources import list_recipes
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import SourceSection, dump_recipe
from finetune.recipe.trl_options import read_trainer_options

DATA = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(DATA)

    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def list_problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_a_folder_that_was_looked_in_is_named_once(write, tmp_path):
    """The recipe's folder is the current one here."""
    (problem,) = list_problems(write("data: {train: nowhere.txt}"))
    assert problem.endswith(f"nowhere.txt does not exist (looked in {tmp_path})")
    own = list_problems(write("data: {train: pairs.jsonl}\nclean: {mix: {classifier: gone, shares: {a: 1}}}"))
    assert own[0].endswith(f"gone does not exist (looked in {tmp_path}); give a folder")


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_are_fine(name):
    path = list_recipes()[name]
    recipes = [stage.recipe for stage in load_chain(path).trainings]
    assert {recipe.method for recipe in recipes} <= set(METHODS)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.parametrize("name", ["demo", "recipes/demo.yaml"])
def test_shipped_recipes_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path(name))
    assert recipe == load_recipe(list_recipes()["demo"])
    assert recipe.recipe.output == str(tmp_path / "runs" / "demo")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text("seed: 7\ndata: {train: demo.yaml}\n")
    if name != "demo":
        assert load_recipe(Path(name)).recipe.seed == 7  # a file of one's own wins


def test_paths_become_absolute(write, tmp_path):
    recipe = load_recipe(write("data: {train: pairs.jsonl}\nmodel: {checkpoint: .}\n"))
    assert recipe.recipe.data.train == (str(tmp_path / "pairs.jsonl"),)
    assert recipe.recipe.model.checkpoint == str(tmp_path)
    assert recipe.recipe.output == str(tmp_path / "runs" / "recipe")


def test_files_are_found_beside_the_recipe_first(write, tmp_path, monkeypatch):
    path = write("data: {train: pairs.jsonl}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pairs.jsonl").write_text(DATA)
    (elsewhere / "mine.jsonl").write_text(DATA)
    monkeypatch.chdir(elsewhere)
    assert load_recipe(path).recipe.data.train == (str(tmp_path / "pairs.jsonl"),)
    assert load_recipe(path, ["data.train=mine.jsonl"]).recipe.data.train == (str(elsewhere / "mine.jsonl"),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method: stf", "method: 'stf' is unknown; did you mean 'sft'?"),
        ("method: imitate", "method: 'imitate' is unknown; known are "),
        (
            "model: {checkpoint: before-anealing}",
            "model.checkpoint: 'before-anealing' is unknown; did you mean 'before-annealing'?",
        ),
        ("model: {checkpoint: ./missing}", "model.checkpoint: there is no folder ./missing"),
        ("data: {train: pair.jsonl}", "data.train: pair.jsonl does not exist; pairs.jsonl does"),
        ("data: {train: []}", "data.train: is missing; name at least one data file"),
        ("data: {train: [{path: pairs.jsonl, wait: 1}]}", "data.train[1].wait: unknown key; did you mean 'weight'?"),
        ("data: {train: [{path: pair.jsonl}]}", "data.train[1].path: pair.jsonl does not exist; pairs.jsonl does"),
        ("data: {train: [{weight: 2}]}", "data.train[1]: needs one of path (files) and hub (a data set's owner/name)"),
        ("data: {train: [{hub: gsm8k}]}", "data.train[1].hub: must read owner/name; found 'gsm8k'"),
        (
            "data: {train: openai/gsm8k}",
            "data.train: openai/gsm8k does not exist; a data set of the hub is written {hub:",
        ),
        ("data: {train: [{path: pairs.jsonl, split: x}]}", "data.train[1].split: works only for a data set of the hub"),
        ("data: {train: [{path: pairs.jsonl, weight: 0}]}", "data.train[1].weight: must be above 0; found 0"),
        ("data: {train: [{path: pairs.jsonl, rows: 0}]}", "data.train[1].rows: must be at least 1; found 0"),
        (
            "data: {train: [{path: pairs.jsonl, rows: 1, weight: 1}]}",
            "data.train[1]: takes a weight or a number of rows",
        ),
        ("data: {train: [{path: pairs.jsonl, rows: few}]}", "data.train[1].rows: must be a whole number or null"),
        ("data: {template: yulan_mini}", "data.template: 'yulan_mini' is unknown; did you mean 'yulan-mini'?"),
        ("data: {template: my.jinja}", "data.template: my.jinja does not exist"),
        ("data: {format: alpacca}", "data.format: 'alpacca' is unknown; did you mean 'alpaca'?"),
        ("data: {held_out: 1.5}", "data.held_out: must be a share below 1"),
        ("data: {held_out: 2, eval: pairs.jsonl}", "data.held_out: data.eval names rows to evaluate on already"),
        ("data: {max_tokens: 0}", "data.max_tokens: must be at least 8; found 0"),
        ("adapter: {rank: 0}", "adapter.rank: must be at least 1; found 0"),
        ("adapter: {dropout: 1.0}", "adapter.dropout: must be at least 0 and below 1; found 1.0"),
        ("adapter: {targets: [lm_head]}", "adapter.targets: lm_head cannot carry LoRA"),
        ("adapter: {targets: [q_porj]}", "adapter.targets: 'q_porj' is unknown; did you mean 'q_proj'?"),
        ("adapter: {train_tokens: [104, 104]}", "adapter.train_tokens: must be token ids, each once"),
        ("adapter: {kind: none, rank: 8}", "adapter.rank: has no effect where adapter.kind is none"),
        ("adapter: {kind: none}\nmodel: {quantize: nf4}", "model.quantize: nf4 weights cannot be trained in full"),
        ("adapter: {init: pissa}\nmodel: {quantize: nf4}", "adapter.init: pissa changes the base weights"),
        ("adapter: {init: pissa, dora: true}", "adapter.dora: cannot be combined with adapter.init: pissa"),
        ("trainer: {lerning_rate: 1e-4}", "trainer.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        (
            "trainer: {max_length: 12}",
            "trainer.max_length: set data.max_tokens instead; the kit sets this option itself",
        ),
        ("trainer: {learning_rate: fast}", "trainer.learning_rate: must be a number; found 'fast'"),
        ("trainer: {learning_rate: }", "trainer.learning_rate: must be a number; found nothing"),
        ("trainer: {num_train_epochs: true}", "trainer.num_train_epochs: must be a number; found true"),
        ("trainer: {lr_scheduler_type: cosin}", "trainer.lr_scheduler_type: must be one of linear, cosine,"),
        ("trainer: {optim: adam8}", "trainer.optim: must be one of "),
        ("trainer: {loss_type: dpo}", "trainer.loss_type: 'dpo' is unknown; known are dft, nll"),
    ],
)
def test_each_mistake_has_its_own_sentence(write, text, problem):
    if "data:" not in text:
        text += "\ndata: {train: pairs.jsonl}"
    elif "train:" not in text:
        text = text.replace("{", "{train: pairs.jsonl, ", 1)
    problems = list_problems(write(text))
    assert len(problems) == 1
    assert problems[0].startswith(problem)


MIXTURES = {
    "mixture: phase26": "data.sources: is missing; give files for names of phase26, such as",
    "mixture: phse26, sources: {web: pairs.jsonl}": (
        "data.mixture: 'phse26' is unknown; did you mean 'phase26'? Known are phase1 to phase27 and phase26-4k"
    ),
    "sources: {web: pairs.jsonl}": "data.mixture: is missing; data.sources needs a published mixture, such as phase25",
    "mixture: phase1, sources: {web: pair.jsonl}": "data.sources.web: pair.jsonl does not exist; pairs.jsonl does",
    "mixture: phase1, sources: {web: 3}": "data.sources.web: must be text or a section of keys and values; found 3",
    "mixture: phase1, sources: {wbe: pairs.jsonl}": "data.sources.wbe: unknown; did you mean 'web'?",
    "mixture: phase1, sources: {ioccc: pairs.jsonl}": "data.sources.ioccc: phase1 has no such data; it is in phase25",
    "mixture: phase1, sources: {web: {path: pairs.jsonl, weight: 2}}": "data.sources.web: takes no weight and no number",
    "mixture: phase1, sources: {web: {hub: c4}}": "data.sources.web.hub: must read owner/name; found 'c4'",
    "mixture: phase1, sources: {web: {wait: 2, path: pairs.jsonl}}": "data.sources.web.wait: unknown key; did you mean",
    "mixture: phase1, sources: {web: pairs.jsonl}, train: pairs.jsonl": "data.train: data.mixture and data.sources name the rows to train on",
}


@pytest.mark.parametrize("data", MIXTURES)
def test_mistakes_in_a_mixture(write, data):
    assert list_problems(write(f"data: {{{data}}}\n"))[0].startswith(MIXTURES[data])


def test_a_mixture_takes_the_place_of_files_to_train_on(write, tmp_path):
    recipe = load_recipe(write("data: {mixture: phase26, sources: {web: pairs.jsonl, code: {hub: a/b}}}\n"))
    assert recipe.recipe.data.train == ()
    assert recipe.recipe.data.sources == {"web": str(tmp_path / "pairs.jsonl"), "code": SourceSection(hub="a/b")}
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe.recipe))
    assert load_recipe(tmp_path / "again.yaml").recipe.data == recipe.recipe.data


def test_all_problems_come_together(write):
    problems = list_problems(
        write("methud: dpo\ntrainer: {max_length: 5, packng: true}\ndata: {train: pair.jsonl}\n"), "adapter.rank=-1"
    )
    assert problems == [
        "methud: unknown key; did you mean 'method'?",
        "trainer.max_length: set data.max_tokens instead; the kit sets this option itself",
        "trainer.packng: unknown key; did you mean 'packing'?",
        "data.train: pair.jsonl does not exist; pairs.jsonl does",
        "adapter.rank: must be at least 1; found -1",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_options_read_from_the_sources_are_those_of_the_class(name, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    method = METHODS[name]
    config = getattr(importlib.import_module(method.config_module), method.config_class)
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    assert set(read_trainer_options(method.config_module, method.config_class)) == fields
    # ORPO and CPO live in TRL's experimental namespace; this fails first when they move.
    assert hasattr(importlib.import_module(method.trainer_module), method.trainer_class)
    assert set(method.owned) <= fields
    assert set(method.words) <= fields
    assert set(method.defaults) <= fields - set(method.owned)


def test_choices_read_from_the_sources_are_those_of_the_enums():
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    options = read_trainer_options("trl.trainer.sft_config", "SFTConfig")
    assert set(options["lr_scheduler_type"].choices) == {member.value for member in SchedulerType}
    assert set(options["eval_strategy"].choices) == {member.value for member in IntervalStrategy}


def test_checking_never_imports_torch(write):
    path = write("data: {train: pairs.jsonl}\n")
    code = (
        "import sys\nfrom finetune.cli.main import main\n"
        f"try:\n    main(['check', {str(path)!r}])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_states_are_found_beside_the_recipe(tmp_path, monkeypatch):
    """They were looked for only from where the command runs."""
    (tmp_path / "sub" / "states").mkdir(parents=True)
    (tmp_path / "sub" / "rows.txt").write_text("a text\n", encoding="utf-8")
    text = (
        "method: anneal\nmodel: {checkpoint: nano, architecture: native}\ndata: {train: rows.txt, max_tokens: 64}\n"
        "adapter: {kind: none}\noptimizer: {states: states}\n"
    )
    (tmp_path / "sub" / "recipe.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("sub/recipe.yaml")).recipe.optimizer.states == str(tmp_path / "sub" / "states")


def test_a_name_that_is_no_utf8_is_refused(tmp_path, make_recipe):
    """Python reads such a file name into halves of characters; `check` was fine, and the training a traceback."""
    with pytest.raises(RecipeError) as raised:
        make_recipe("run\udcff", "data.system=x")
    (problem,) = raised.value.problems
    assert problem.startswith("output: ") and problem.endswith("\\udcff' is no UTF-8; rename the file or the folder")
