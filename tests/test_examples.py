"""The examples run as their docstrings say, and stay short."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.evaluate.chat import answer, open_model
from finetune.resources import find_demo_data, list_templates

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def run_example(name, *arguments):
    path = next(path for path in EXAMPLES if path.stem == name)
    done = subprocess.run([sys.executable, str(path), *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout


def test_compare_checkpoints(tmp_path, nano):
    lines = find_demo_data("demo_eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    table = run_example("compare_checkpoints", tmp_path / "rows.jsonl", "nano", nano).splitlines()
    assert [line.split()[0] for line in table] == ["start", "nano", str(nano)]
    assert table[1].split()[1:] == table[2].split()[1:]


def test_open_export_answers_as_chat_does(nano_llama, tmp_path):
    shutil.copytree(nano_llama, tmp_path / "export")
    shutil.copyfile(list_templates()["yulan-mini"], tmp_path / "export" / "chat_template.jinja")
    expected = answer(open_model(str(tmp_path / "export")), [{"role": "user", "content": "Hello!"}], 64).text
    assert run_example("open_export", tmp_path / "export", "Hello!").rstrip("\n") == expected.rstrip("\n")
