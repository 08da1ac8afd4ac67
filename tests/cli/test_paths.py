"""Paths and names that cannot be, on the command line: one message and status 2, never a traceback."""

import shutil

import pytest

from finetune.cli.main import main
from finetune.files.resources import find_demo_data, list_recipes

LONG = "a" * 300


@pytest.fixture
def fail(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        output = capsys.readouterr()
        assert (ended.value.code, output.out) == (2, "")
        assert "Traceback" not in output.err
        return output.err

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["check", LONG],
        ["check", "sft_qlora", "-s", f"data.train={LONG}"],
        ["check", "sft_qlora", "-s", f"model.checkpoint={LONG}"],
        ["chat", LONG, "--prompt", "a"],
        ["export", LONG, "-o", "out"],
        ["fold", LONG, "-o", "out"],
        ["fold", "nano", "-o", LONG],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_names_that_are_too_long(fail, words):
    assert "too long" in fail(*words)


@pytest.mark.parametrize(
    "words", [["chat", "~nouser/x", "--prompt", "a"], ["export", "~nouser/x", "-o", "out"], ["check", "~nouser/x"]]
)
def test_the_home_of_nobody(fail, words):
    assert "~nouser/x" in fail(*words)


@pytest.mark.parametrize("option", ["-o ~/new/{}", "--output=~/new/{}"])
@pytest.mark.parametrize(
    ("words", "name"), [("recipes demo", "r.yaml"), ("fold nano", "nano"), ("lint ~/demo.yaml", "rows")]
)
def test_a_home_that_no_shell_has_replaced(tmp_path, monkeypatch, words, name, option):
    """A shell replaces no `~` in quotes or behind `=`: files were written into a folder of that name, other verbs refused it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_demo_data("demo.jsonl").parent, tmp_path / "data")
    shutil.copy(list_recipes()["demo"], tmp_path / "demo.yaml")
    option = option.replace("-o ", "--fix ").replace("--output", "--fix") if words.startswith("lint") else option
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), *option.format(name).split()])
    assert ended.value.code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name] and not (tmp_path / "~").exists()


def test_a_new_file_in_the_home_of_nobody(fail, tmp_path):
    assert "~nobody-here/r.yaml: there is no user of this name" in fail("recipes", "demo", "-o", "~nobody-here/r.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["chat all --prompt a", "evaluate all --data rows.jsonl", "export all -o out"])
def test_the_folder_of_a_chain_or_of_runs_names_one_inside(fail, tmp_path, words):
    """`chat` and `evaluate` said "holds no config.json, so it is not a checkpoint", and `export` named no run."""
    for name in ("sft", "dpo"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "run.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "all: is neither a run directory nor " in (message := fail(*words.split()))
    assert "; name one inside, such as all/dpo" in message


@pytest.mark.parametrize(
    ("name", "close"),
    [("8gb", "tiers/8gb"), ("8GB", "tiers/8gb"), ("SFT_qlora", "sft_qlora"), ("sft_qlor", "sft_qlora")],
)
def test_close_names_of_recipes(fail, name, close):
    assert f"did you mean the shipped recipe {close!r}?" in fail("plan", name)
    assert f"did you mean {close!r}?" in fail("recipes", name)


def test_a_folder_that_holds_other_things(fail, tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "adapter_config.json").write_text("[]")
    assert "must hold an object; found list" in fail("export", "list", "-o", "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "this run has not finished" in fail("export", "run", "-o", "out")


def test_a_recipe_is_printed_where_the_file_is_a_dash(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "sft_qlora", "-o", "-"])
    assert ended.value.code == 0
    assert "adapter:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_stages_share_a_line_and_need_a_key(fail, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "chain.yaml").write_text(
        "data: {train: rows.jsonl}\nadapter: {r: 4}\nstages: [{name: one}, {name: two}]\n"
    )
    message = fail("check", "chain.yaml", "-s", "stages.one")
    assert "one, two: adapter.r: unknown key; this is adapter.rank here" in message
    assert "--set stages.one: must read stages.NAME.section.key=value" in message


@pytest.mark.parametrize("words", [["fold", "nano", "-o", "~nobody-here/x"], ["check", "sft_lora"], ["recipes"]])
def test_what_cannot_be_written_or_is_gone(fail, tmp_path, monkeypatch, words):
    """`fold -o ~nobody/x` made a folder of that name; in a removed folder every verb ended in a traceback."""
    if words[0] == "fold":
        assert "~nobody-here/x: there is no user of this name" in fail(*words)
        assert not list(tmp_path.iterdir())
        return
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert fail(*words) == f"finetune {words[0]}: the current folder has been removed; change to another folder\n"


def test_the_check_names_what_training_would_refuse(fail, tmp_path, monkeypatch):
    """`check` called a recipe fine whose rows may not be read, or whose output no file system takes."""
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(
        "os.access", lambda path, mode: not str(path).endswith("rows.jsonl")
    )  # root may read everything
    words = ["check", "sft_lora", "-s", "data.train=rows.jsonl", "-s", f"output={LONG}"]
    message = fail(*words)
    assert "data.train: rows.jsonl cannot be read: Permission denied" in message.replace(f"{tmp_path}/", "")
    assert "output: a name in it is longer than 255 bytes" in message
