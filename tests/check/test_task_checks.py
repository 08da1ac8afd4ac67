"""What `finetune check` says of the tasks that a run is watched with, without a request and without torch."""

import json

import pytest

from finetune.cli.main import main
from finetune.errors import FinetuneError, RecipeError
from finetune.evaluation.tasks.task_table import find_forms


def refuse(make_recipe, tasks):
    with pytest.raises(RecipeError) as caught:
        make_recipe("run", f"data.tasks={json.dumps(tasks)}")
    return caught.value.problems


def test_a_folder_without_a_file_of_its_task(make_recipe, tmp_path):
    """`check` called it fine, and the training ended before its first step; files of no rows counted as well."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "lambada.bak").write_text("")
    (tmp_path / "tasks" / "gsm8k_test.jsonl").write_text("")
    rows, folder = str(tmp_path / "rows.jsonl"), str(tmp_path / "tasks")
    assert refuse(make_recipe, [{"name": "lambada", "path": folder}]) == [
        f"data.tasks[1].path: {folder} holds no file of lambada, such as lambada.jsonl or lambada_test.jsonl"
    ]
    assert refuse(make_recipe, [{"name": "gsm8k", "path": rows, "exemplars": folder}]) == [
        f"data.tasks[1].exemplars: {folder} holds no file of gsm8k, such as gsm8k_train.jsonl or gsm8k-train.jsonl"
    ]
    (tmp_path / "tasks" / "gsm8k_train.jsonl").write_text("")
    make_recipe("run", f"data.tasks={json.dumps([{'name': 'gsm8k', 'path': folder, 'exemplars': folder}])}")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{name: gsm8k, path: rows.jsonl}", "the 5 exemplars of each prompt of gsm8k are read from the hub (openai/gsm8k); exemplars would name files"),
        ("{name: mbpp, exemplars: rows.jsonl}", "the rows of mbpp are read from the hub (google-research-datasets/mbpp); path would name files"),
        ("lambada", "the rows of lambada are read from the hub (EleutherAI/lambada_openai); path would name files"),
        ("{name: lambada, path: rows.jsonl}", None),
        ("{name: gsm8k, path: rows.jsonl, exemplars: rows.jsonl}", None),
    ],
)  # fmt: skip
def test_what_comes_from_the_hub_is_said(make_recipe, tmp_path, capsys, monkeypatch, task, said):
    """Exemplars that no key names were missed only by the run, on a machine without a network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["check", "recipe.yaml", "-s", f"data.tasks=[{task}]"])
    assert left.value.code == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "the hub" in line]
    assert told == ([] if said is None else [f"data.tasks[1]: {said}"])


def test_tasks_of_the_other_program_belong_to_one_verb(make_recipe):
    told = (
        "'lm_eval:arc_easy' is a task of lm-evaluation-harness, which only `finetune evaluate MODEL --tasks lm_eval:arc_easy` asks; "
        "here name one of gsm8k, humaneval, lambada, mbpp"
    )
    assert refuse(make_recipe, ["lm_eval:arc_easy"]) == [f"data.tasks[1].name: {told}"]
    with pytest.raises(FinetuneError) as caught:
        find_forms(["lambada", "lm_eval:arc_easy"], "harness")
    assert str(caught.value) == f"--tasks: {told}"
