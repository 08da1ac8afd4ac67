"""`finetune clean --emit`: what the file says; tests/runtimes/test_datatrove.py runs it."""

import ast
import json

import pytest

from finetune.cleaning.cluster_rows import read_rows
from finetune.cli.main import main

RECIPE = """
model: {checkpoint: nano}
data: {train: [one.jsonl, two.jsonl], max_tokens: 64}
clean: {near_duplicates: {threshold: 0.7, ngram: 4, permutations: 64, best_by: score}, judge: {endpoint: own, drop_lowest: 0.1}}
endpoints: {own: {model: nano}}
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, nano_llama):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in ("one", "two"):
        rows = [{"prompt": f"{name} {number}?", "completion": "Yes. " * number} for number in range(1, 4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["clean", "r.yaml", "-o", "p.py", "--emit", "datatrove", *arguments])
        return ended.value.code, capsys.readouterr()

    return run


def read_constants(file):
    """The names that the file gives literal values to."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], ast.literal_eval(node.value)
            pairs = zip(target.elts, value, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
            found.update({name.id: each for name, each in pairs})
    return found


def test_the_file_has_the_thresholds_and_names_what_it_cannot_do(call, tmp_path):
    status, shown = call("-s", "clean.rules=[mojibake]")
    assert status == 0
    constants = read_constants(tmp_path / "p.py")
    assert {
        name: constants[name] for name in ("STEPS", "RULES", "THRESHOLD", "NGRAM", "PARTS", "TASKS", "EXECUTOR")
    } == {
        "STEPS": ["rules", "near_duplicates"],
        "RULES": ["mojibake"],
        "THRESHOLD": 0.7,
        "NGRAM": 4,
        "PARTS": ["trained", "question"],
        "TASKS": 2,
        "EXECUTOR": "local",
    }
    assert (constants["RECIPE"], constants["SETTINGS"]) == (str(tmp_path / "r.yaml"), ["clean.rules=[mojibake]"])
    # 64 slots; 16 bands of 4 rows are the fewest that find 0.94 of what shares 0.7: 1 - (1 - 0.7 ** 4) ** 16 = 0.988.
    assert (constants["BUCKETS"], constants["HASHES"]) == (16, 4)
    for text in (shown.out, (tmp_path / "p.py").read_text()):
        assert "judge" in text and "near_duplicates.best_by" in text


def test_a_recipe_without_a_step_for_it_writes_nothing(call, tmp_path):
    status, shown = call("-s", "clean.near_duplicates={}")
    assert status == 2 and "clean: names no step that datatrove can do; it can do unreadable, rules" in shown.err
    assert not (tmp_path / "p.py").exists()


@pytest.mark.parametrize("name", ["datatrove.py", "my.pipeline.py"])
def test_a_name_that_tasks_cannot_import_is_refused(call, tmp_path, name):
    status, shown = call("-o", name)
    assert status == 2 and "tasks import the pipeline by its name" in shown.err
    assert not (tmp_path / name).exists()


def test_a_file_is_not_written_over(call, tmp_path):
    (tmp_path / "p.py").write_text("mine")
    status, shown = call()
    assert status == 2 and "exists already" in shown.err
    assert (tmp_path / "p.py").read_text() == "mine"


def test_shares_of_the_files_are_consecutive_and_whole(call, tmp_path):
    places = [
        [json.loads(row.place)[:2] for row in read_rows("r.yaml", ["clean.unreadable=true"], rank, 3)]
        for rank in range(3)
    ]
    files = [[str(tmp_path / f"{name}.jsonl"), number] for name in ("one", "two") for number in (1, 2, 3)]
    assert sorted(len(share) for share in places) == [0, 3, 3]
    assert [place for share in places for place in share] == files
