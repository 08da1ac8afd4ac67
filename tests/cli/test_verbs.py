"""The table of verbs: every example parses and names what is there; the version; what loading the table costs."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from finetune.cli.main import main
from finetune.cli.parser import make_parser
from finetune.cli.verbs import VERBS
from finetune.files.resources import list_all_recipes

EXAMPLES = [(verb, example) for verb in VERBS for example in verb.examples]


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def test_every_verb_stands_once():
    names = [verb.name for verb in VERBS]
    assert len(set(names)) == len(names)
    assert len({verb.run for verb in VERBS}) == len(names)


@pytest.mark.parametrize(("verb", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_examples_parse(verb, example):
    program, *words = shlex.split(example)
    assert (program, words[0]) == ("finetune", verb.name)
    parsed = make_parser().parse_args(words)
    assert parsed.run is verb.run
    recipe = vars(parsed).get("recipe") or (vars(parsed).get("name") if verb.name == "recipes" else None)
    assert recipe is None or recipe.name == "my.yaml" or str(recipe) in list_all_recipes()


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_ends_in_examples(capsys, verb):
    assert 2 <= len(verb.examples) <= 3
    status, out, _ = call(capsys, verb.name, "--help")
    assert status == 0
    assert out.endswith("\n".join(["", "examples:", *(f"  {example}" for example in verb.examples), ""]))


def test_verbs_say_what_they_do(capsys):
    """The help of a verb is a sentence in the imperative, and the list of all shows it."""
    out = " ".join(call(capsys, "--help")[1].split())
    for verb in VERBS:
        assert verb.help[0].islower() and not verb.help.endswith(".")
        assert f"{verb.name} {verb.help}" in out


def test_version(capsys):
    status, out, err = call(capsys, "--version")
    assert (status, err) == (0, "")
    assert out.startswith("yulan-finetune ") and out.count(".") >= 2 and out.endswith("\n")


def test_the_table_loads_nothing_heavy():
    code = (
        "import sys, finetune.cli.verbs\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'yaml', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_parsers_keep_json():
    actions = make_parser()._subparsers._group_actions
    (verbs,) = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    assert all("--json" in parser._option_string_actions for parser in verbs.choices.values())


def test_recipes_as_a_table_and_as_json(capsys):
    status, out, err = call(capsys, "recipes", "--json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    assert [row["name"] for row in rows] == list(list_all_recipes())
    assert all(set(row) == {"name", "method", "trains", "needs"} and all(row.values()) for row in rows)
    text = call(capsys, "recipes")[1]
    assert all(f"{row['name']} " in text and row["needs"] in text for row in rows)


def test_a_recipe_is_copied_to_a_new_file_only(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, "recipes", "sft_qlora", "-o", "mine/my.yaml")
    assert (status, out, err) == (0, "", "wrote mine/my.yaml\n")
    text = (tmp_path / "mine" / "my.yaml").read_text(encoding="utf-8")
    assert call(capsys, "recipes", "recipes/sft_qlora.yaml")[1] == text
    assert json.loads(call(capsys, "recipes", "sft_qlora", "--json")[1])["text"] == text
    assert json.loads(call(capsys, "recipes", "sft_qlora", "--json", "-o", "b.yaml")[1]) == {"output": "b.yaml"}
    (tmp_path / "mine" / "my.yaml").write_text("seed: 1\n")
    for path, sentence in (("mine/my.yaml", "exists already"), ("mine", "exists already"), ("b.yaml/c", "cannot be")):
        status, out, err = call(capsys, "recipes", "sft_qlora", "-o", path)
        assert (status, out) == (2, "") and f"{path}: {sentence}" in err and "Traceback" not in err
    assert (tmp_path / "mine" / "my.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sft_qlra"], "sft_qlra: 1 problem\n  - no shipped recipe has this name; did you mean 'sft_qlora'?\n"),
        (["-o", "my.yaml"], "-o: 1 problem\n  - needs the name of a recipe to copy"),
        (["--keys", "sft_qlora"], "--keys: 1 problem\n  - explains every recipe; leave sft_qlora out\n"),
    ],
)
def test_recipes_refuses(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, "recipes", *arguments)
    assert (status, out) == (2, "") and sentence in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_recipe_names_the_shipped_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb in ("check", "preview", "lint", "plan", "train"):
        status, out, err = call(capsys, verb, "sft_qlra")
        assert (status, out) == (2, "")
        assert "did you mean the shipped recipe 'sft_qlora'?" in err
