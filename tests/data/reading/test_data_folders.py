"""Of a folder only the data that is to be trained is read, and all else is named."""

import json

import pytest
from datasets import Dataset, DatasetDict

from finetune.data.reading.data_folders import choose_files
from finetune.errors import DataError

ROW = {"prompt": "Q", "completion": "A"}


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    return folder


def choose(path, split="train"):
    root = path.parent if "*" in path.name else path
    chosen = choose_files(path, split)
    return [file.relative_to(root).as_posix() for file in chosen.taken], chosen.left_out


@pytest.mark.parametrize(
    ("names", "taken", "left_out"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], {"test.jsonl": "split test"}),
        (["rows.jsonl", "dev.jsonl"], ["rows.jsonl"], {"dev.jsonl": "split validation"}),
        (
            [
                "data/train-00000-of-00002.jsonl",
                "data/train-00001-of-00002.jsonl",
                "data/validation-00000-of-00001.jsonl",
            ],
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            {"data/validation-00000-of-00001.jsonl": "split validation"},
        ),
        (
            ["train/a.jsonl", "test/a.jsonl", "extra/a.jsonl"],
            ["train/a.jsonl"],
            {"test/a.jsonl": "split test", "extra/a.jsonl": "beside train"},
        ),
        (
            ["math_train.jsonl", "math_test.jsonl", "more.jsonl"],
            ["math_train.jsonl", "more.jsonl"],
            {"math_test.jsonl": "split test"},
        ),
        (["train_sft/a.jsonl", "test_sft/a.jsonl"], ["train_sft/a.jsonl"], {"test_sft/a.jsonl": "split test"}),
        (["unit_tests_of_code.jsonl", "contest.jsonl"], ["contest.jsonl", "unit_tests_of_code.jsonl"], {}),
        (["test.jsonl", "validation.jsonl"], ["test.jsonl", "validation.jsonl"], {}),
        (["train1.jsonl", "test2.jsonl"], ["train1.jsonl"], {"test2.jsonl": "split test"}),
    ],
)
def test_of_splits_only_train_is_read(tmp_path, names, taken, left_out):
    assert choose(fill(tmp_path, *names)) == (taken, left_out)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["validation.jsonl"]),
        (["train/a.jsonl", "test/a.jsonl"], ["test/a.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["test/a.jsonl", "test/b.jsonl"], ["test/a.jsonl", "test/b.jsonl"]),
    ],
)
def test_for_evaluation_a_held_out_split_is_read(tmp_path, names, taken):
    assert choose(fill(tmp_path, *names), "evaluation")[0] == taken


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".ipynb_checkpoints/train-checkpoint.jsonl", "hidden"),
        (".cache/huggingface/a.jsonl", "hidden"),
        ("._train.jsonl", "hidden"),
        ("deep/.hidden/a.csv", "hidden"),
        ("README.txt", "no data"),
        ("LICENSE.txt", "no data"),
        ("requirements.txt", "no data"),
        ("README.md", "no data"),
        ("prepare.py", "no data"),
        ("cache-7b77b14205099433.arrow", "a cache of datasets"),
        ("tmpk2j3.arrow", "a cache of datasets"),
        ("dataset_infos.json", "a cache of datasets"),
    ],
)
def test_what_is_no_data_is_named(tmp_path, name, reason):
    fill(tmp_path, "rows.jsonl", "notes/poem.txt", name)
    assert choose(tmp_path) == (["notes/poem.txt", "rows.jsonl"], {name: reason})
    assert choose_files(tmp_path).describe(tmp_path) == (f"not read in {tmp_path}: {name} ({reason})",)


def test_a_glob_takes_no_hidden_files_and_no_other_splits(tmp_path):
    fill(tmp_path, "train.jsonl", "test.jsonl", ".old.jsonl")
    assert choose(tmp_path / "*.jsonl") == (["train.jsonl"], {".old.jsonl": "hidden", "test.jsonl": "split test"})
    assert choose(tmp_path / "te*.jsonl") == (["test.jsonl"], {})


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path):
    fill(tmp_path, ".test.jsonl")
    assert choose_files(tmp_path / ".test.jsonl").taken == [tmp_path / ".test.jsonl"]


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no data files; known are \.json"):
        choose_files(fill(tmp_path, "README.txt", ".a.jsonl"))


def test_many_files_are_named_in_one_line(tmp_path):
    fill(tmp_path, "rows.jsonl", *(f"page{number}.html" for number in range(9)))
    (note,) = choose_files(tmp_path).describe(tmp_path)
    assert note.endswith("page5.html (no data) and 3 more files")


def test_a_saved_data_set_in_splits_and_with_caches(tmp_path):
    splits = {name: Dataset.from_list([ROW] * 4) for name in ("train", "test", "extra")}
    DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert choose(tmp_path / "dict") == (
        ["train/data-00000-of-00001.arrow"],
        {"extra/data-00000-of-00001.arrow": "beside train", "test/data-00000-of-00001.arrow": "split test"},
    )
    splits["train"].save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "data-00002-of-00003.arrow").write_bytes(b"of an earlier save")
    taken, left_out = choose(tmp_path / "one")
    assert taken == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert left_out == {"data-00002-of-00003.arrow": "no part of the saved data set"}
