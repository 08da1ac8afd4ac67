"""`finetune init` writes a recipe that passes the check and trains, asks what no option says, and refuses what cannot be trained."""

import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from finetune.check.recipes import load_recipe
from finetune.cli.main import main
from finetune.files.resources import find_shipped_recipe
from finetune.guide.commented_recipe import write_commented
from finetune.pipeline.first_recipe import GOALS
from finetune.recipe.yaml_loader import load_recipe_file, parse_yaml

Q, A, B = (
    {"role": role, "content": text} for role, text in (("user", "一加一？"), ("assistant", "二"), ("assistant", "三"))
)
ROWS = {
    "chat": {"messages": [Q, A]},
    "pairs": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "labels": {"prompt": [Q], "completion": [A], "label": True},
}
METHODS = {"chat": "sft", "pairs": "dpo", "labels": "kto"}


@pytest.fixture
def folder(tmp_path, monkeypatch, nano_llama):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys, folder):
    """Return a function that runs `finetune init`; it gives exit status, output and error output."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["init", *map(str, arguments)])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


def write_rows(path, row, count):
    """Write so many rows; of labelled answers, every second is a bad one."""
    labels = [{"label": number % 2 == 0} if "label" in row else {} for number in range(count)]
    path.write_text("".join(f"{json.dumps({**row, **label})}\n" for label in labels), encoding="utf-8")


@pytest.mark.parametrize("goal", ROWS)
def test_rows_of_each_kind_get_a_recipe_of_their_method(call, folder, goal):
    write_rows(folder / "rows.jsonl", ROWS[goal], 50)
    status, output, _ = call("--data", "rows.jsonl", "--base", "nano", "--device", "cpu", "--json")
    assert status == 0
    written = json.loads(output)
    assert (written["method"], written["rows"], written["plan"]["fits"]) == (METHODS[goal], 50, True)
    recipe = load_recipe("my.yaml").recipe
    assert recipe.model.checkpoint == "nano" and recipe.trainer["use_cpu"] is True
    assert recipe.data.train == (str(folder / "rows.jsonl"),) and recipe.data.max_tokens == 256
    assert load_recipe_file(folder / "my.yaml")["data"]["train"] == "rows.jsonl"
    assert load_recipe_file(folder / "my.yaml")["output"] == "runs/my"


def test_the_recipe_trains(call, folder, capsys):
    write_rows(folder / "rows.jsonl", ROWS["chat"], 3)
    assert call("--data", "rows.jsonl", "--base", "nano", "--device", "cpu", "--yes")[0] == 0
    with pytest.raises(SystemExit) as ended:
        main(["train", "my.yaml", "-s", "trainer.max_steps=2", "-s", "adapter.rank=4"])
    assert ended.value.code == 0
    assert "runs/my: 2 steps" in capsys.readouterr().out
    # A run may be continued; the shipped recipe's adapter contradicted its own, and nothing was written.
    assert call("--data", "rows.jsonl", "--base", "runs/my", "--device", "cpu", "--yes", "-o", "next.yaml")[0] == 0
    assert load_recipe("next.yaml").recipe.adapter.rank == 4
    assert "adapter" not in load_recipe_file(folder / "next.yaml")


@pytest.mark.parametrize(("rows", "accumulation", "held_out"), [(39, 1, 0), (40, 2, 0.05), (320, 16, 0.05)])
def test_few_rows_get_small_steps_and_are_all_trained(call, folder, rows, accumulation, held_out):
    """An effective batch size of 16 would make one step of 20 rows."""
    write_rows(folder / "rows.jsonl", ROWS["chat"], rows)
    call("--data", "rows.jsonl", "--base", "nano", "--device", "cpu")
    recipe = load_recipe("my.yaml").recipe
    assert (recipe.trainer["gradient_accumulation_steps"], recipe.data.held_out) == (accumulation, held_out)


def test_what_does_not_fit_the_device_is_left_out_and_counted(call, folder):
    """The memory holds the weights and half of the longest row's activations."""
    long = {"messages": [Q, {"role": "assistant", "content": "word " * 8000}]}
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (long, ROWS["chat"])))
    status, output, _ = call("--data", "rows.jsonl", "--base", "nano", "--device", "1GB", "--json")
    first = json.loads(output)
    most = load_recipe("my.yaml").recipe.data.max_tokens
    assert status == 0 and first["plan"]["peak_bytes"] <= first["plan"]["memory_bytes"] == 2**30
    assert first["longest"] > most
    assert f"1 row is longer than {most:,} tokens" in first["notes"][-1]


def test_questions_are_asked_where_options_are_missing(call, folder, monkeypatch):
    write_rows(folder / "rows.jsonl", ROWS["pairs"], 2)
    answers = io.StringIO("rows.jsonl\nchat\nnano\ncpu\n")
    answers.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", answers)
    status, _, errors = call()
    assert status == 0 and errors.count("?") == 4
    assert "2 rows (preference). Train them for pairs, chat, labels? [pairs]" in errors
    recipe = load_recipe("my.yaml").recipe
    assert (recipe.method, recipe.model.checkpoint) == ("sft", "nano")


def test_an_empty_answer_takes_the_default(call, folder, monkeypatch):
    write_rows(folder / "rows.jsonl", ROWS["pairs"], 2)
    answers = io.StringIO("\n\n")
    answers.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", answers)
    assert call("--data", "rows.jsonl", "--base", "nano")[0] == 0
    assert load_recipe("my.yaml").recipe.method == "dpo"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"prompt": "Q"}', (), "prompts without answers"),
        (json.dumps(ROWS["chat"]), ("--goal", "pairs"), "cannot be trained for pairs; they can for chat"),
        ("{", (), "rows.jsonl, line 1: broken JSON"),
        (json.dumps(ROWS["chat"]), ("--base", "nanno"), "did you mean 'nano'"),
        (json.dumps(ROWS["chat"]), ("--device", "GTX 1"), "the GPU 'GTX 1' is unknown"),
        (json.dumps(ROWS["chat"]), ("--device", "100MB"), "even the smallest settings do not fit"),
        (json.dumps({"messages": [Q, Q, A]}), (), "data.merge_turns: true"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(call, folder, content, arguments, message):
    (folder / "rows.jsonl").write_text(content)
    status, output, errors = call("--data", "rows.jsonl", "--base", "nano", *arguments)
    assert (status, output) == (2, "") and message in errors
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl"]


def test_without_rows_and_nobody_to_ask_the_option_is_named(call):
    status, _, errors = call("--yes")
    assert status == 2 and "--data is missing" in errors


def test_an_existing_file_stays(call, folder):
    write_rows(folder / "rows.jsonl", ROWS["chat"], 2)
    (folder / "my.yaml").write_text("mine")
    status, _, errors = call("--data", "rows.jsonl", "--base", "nano", "--device", "cpu")
    assert status == 2 and "my.yaml: exists already" in errors
    assert (folder / "my.yaml").read_text() == "mine"


@pytest.mark.parametrize("goal", GOALS)
def test_every_key_of_the_shipped_recipe_is_explained_and_kept(goal):
    content = load_recipe_file(find_shipped_recipe(Path(GOALS[goal].recipe)))
    content["data"]["train"] = "名 # one: two.jsonl"
    text = write_commented(content, "first\nsecond")
    assert parse_yaml(text, "text") == content
    lines = text.splitlines()
    assert lines[:2] == ["# first", "# second"]
    bare = [line for before, line in pairwise(lines) if "#" not in before and not line.lstrip().startswith("#")]
    assert bare == []
