"""A damaged folder of an evaluation: its lines are asked again, and what cannot be continued is one message."""

import json
from types import SimpleNamespace

import pytest

from finetune.errors import OutputError
from finetune.evaluation.tasks.run_tasks import evaluate_tasks
from finetune.evaluation.tasks.task_results import SETTINGS_FILE, SampleFile, check_folder, holds_figures, weigh_gold
from finetune.evaluation.tasks.task_settings import TaskSettings
from finetune.files.safety.locks import lock_folder

SETTINGS = {"protocol": "harness", "rows of lambada": "7ee"}
MEASURES = [SimpleNamespace(field="correct")]
DAMAGED = [
    {"row": 1},
    {"row": True, "correct": 1},
    {"row": 1.0, "correct": 1},
    {"row": 1, "correct": "yes"},
    {"row": 1, "correct": None},
    {"row": 1, "correct": 1, "gold_bits": 2.5},
    {"row": 1, "correct": 1, "gold_bits": "2", "gold_bytes": 1},
    [1],
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_asked_again(tmp_path, line):
    # Such a line counted as asked, and the summary ended with a traceback.
    whole = [{"row": 0, "correct": True}, {"row": 2, "correct": 0.5, "gold_bits": 2.5, "gold_bytes": 1}]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (whole[0], line, whole[1])), encoding="utf-8")
    assert SampleFile(file, holds_figures(MEASURES)).samples == {0: whole[0], 2: whole[1]}
    assert [json.loads(text) for text in file.read_text().splitlines()] == whole


def test_gold_answers_count_only_where_all_samples_have_them():
    gold = {"gold_bits": 6.0, "gold_bytes": 3}
    assert weigh_gold([gold, gold]) == 2.0
    assert weigh_gold([{}, gold]) is None


@pytest.mark.parametrize("content", [[], "x", 5, True])
def test_settings_that_are_no_object_are_one_message(tmp_path, content):
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(OutputError, match=r"evaluation.json: holds no JSON object; the folder is damaged"):
        check_folder(tmp_path, SETTINGS)


def test_a_folder_in_the_place_of_samples_is_one_message(tmp_path):
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(SETTINGS), encoding="utf-8")
    check_folder(tmp_path, SETTINGS)
    (tmp_path / "lambada.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"lambada.jsonl: is a folder, where samples should be"):
        check_folder(tmp_path, SETTINGS)


def test_a_task_that_the_folder_lacks_is_named(tmp_path):
    # The message called it "another rows of gsm8k (None; now 7ee)".
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(SETTINGS), encoding="utf-8")
    message = r"holds an evaluation of other tasks \(lambada; now lambada, gsm8k\); choose another folder with -o"
    with pytest.raises(OutputError, match=message):
        check_folder(tmp_path, SETTINGS | {"rows of gsm8k": "7ee"})
    check_folder(tmp_path, {"protocol": "harness"})
    with pytest.raises(OutputError, match=r"with another rows of lambada \(7ee; now 8ff\)"):
        check_folder(tmp_path, SETTINGS | {"rows of lambada": "8ff"})


def test_a_second_evaluation_into_one_folder_waits_for_the_first(nano_llama, tmp_path):
    """Both asked all rows and appended their answers: each row stood twice in the samples, and both wrote the results."""
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "evaluation"
    rows.write_text('{"text": "one two three four"}\n', encoding="utf-8")
    settings = TaskSettings(("lambada",), data=rows)
    evaluate_tasks(str(nano_llama), settings, folder)
    samples = (folder / "lambada.jsonl").read_bytes()
    (folder / "lambada.jsonl").unlink()
    with lock_folder(folder), pytest.raises(OutputError, match="is using this folder; wait until it has ended"):
        evaluate_tasks(str(nano_llama), settings, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["evaluation.json", "results.json"]
    evaluate_tasks(str(nano_llama), settings, folder)
    assert (folder / "lambada.jsonl").read_bytes() == samples
