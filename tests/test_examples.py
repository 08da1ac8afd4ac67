"""The examples run as their docstrings say, and stay short."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import finetune
from finetune.checkpoints.finding import find_checkpoint
from finetune.files.resources import find_demo_data, list_templates
from finetune.models.opening import open_model
from finetune.runs.run_files import read_metrics
from finetune.yulan.layout import parse_native_config, read_config
from finetune.yulan.states.optimizer_states import open_states

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_the_notebook_runs_and_shows_its_pictures(tmp_path):
    notebook = nbformat.read(EXAMPLES[0].with_name("quickstart.ipynb"), as_version=4)
    shown = [list_shown(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    # Fewer steps than in the notebook; everything else is as it stands there.
    cell = next(cell for cell in notebook.cells if "finetune.load_recipe(" in cell.source)
    source = cell.source
    cell.source = source.replace('"trainer.num_train_epochs=4"', '"trainer.max_steps=2"')
    assert cell.source != source
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [list_shown(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"] == shown
    assert "image/png" in shown[5] and "text/html" in shown[2]
    text = EXAMPLES[0].with_name("quickstart.ipynb").read_text(encoding="utf-8")
    assert "<mark>" in text and str(Path(finetune.__file__).parents[1]) not in text


def list_shown(outputs):
    """Return the kinds of what a cell shows; what libraries say on standard error is not part of it."""
    kinds = [sorted(output.data) if "data" in output else [output.name] for output in outputs]
    return [kind for names in kinds for kind in names if kind != "stderr"]


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
    assert [line.split()[0] for line in table] == ["checkpoint", "nano", str(nano)]
    assert table[1].split()[1:] == table[2].split()[1:]


def test_nano_phases_leave_a_published_checkpoint_each(tmp_path):
    steps = {"nano-phase1": 20, "nano-phase2": 10, "nano-phase3": 10, "nano": 10}
    lines = run_example("nano_phases", tmp_path / "phases", "10").splitlines()
    assert [line.split()[:2] for line in lines] == [[name, str(count)] for name, count in steps.items()]
    losses = []
    for number, name in zip((20, 30, 40, 50), steps, strict=True):
        folder = tmp_path / "phases" / name / "model"
        assert find_checkpoint(str(folder)) == folder
        assert parse_native_config(read_config(folder), folder).num_layers == 4
        if name != "nano":  # the states go on counting, and keep their rates while the schedule changes them
            states = open_states(folder)
            assert states.step == number
            # Matrices inside the layers have theirs divided by the width over that of the authors' small model, 320 / 256.
            assert {group.lr for group in states.groups} == {1e-2, 1e-2 * 256 / 320}
        losses.append(next(line["eval_loss"] for line in read_metrics(folder.parent) if "eval_loss" in line))
    assert not (folder / "latest_universal").exists()
    assert [f"{loss:.4f}" for loss in losses] == [line.split()[5] for line in lines]
    # By 0.24, 0.93 and 0.35: each phase lowers the loss.
    assert min(before - after for before, after in pairwise(losses)) > 0
    run_example("plot_phases", tmp_path / "phases", tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    # The same phases side by side.
    out = run_example("nano_dynamics", tmp_path / "phases", "40")
    assert "after the same fine-tuning" not in out and "loss on the texts of --rows" in out
    found = json.loads((tmp_path / "phases" / "dynamics" / "dynamics.json").read_text(encoding="utf-8"))
    # 128 x 4 tokens a step; the alpha of a run is one that it trained.
    assert [entry["tokens"] for entry in found["checkpoints"]] == [count * 512 for count in (20, 30, 40, 50)]
    assert [entry["activity"]["loss"] for entry in found["checkpoints"]] == sorted(
        (entry["activity"]["loss"] for entry in found["checkpoints"]), reverse=True
    )
    assert found["checkpoints"][3]["tests"]["measured"]["lambada"]["acc"]["test"] == "McNemar, exact"
    assert {entry["alpha"] is None for entry in found["weights"]["nano"]} == {True, False}
    drawn = [path.name for path in (tmp_path / "phases" / "dynamics").glob("*.png")]
    assert sorted(drawn) == ["activity.png", "layers.png", "scores.png", "weights.png"]


def test_open_export_answers_as_chat_does(nano_llama, tmp_path):
    shutil.copytree(nano_llama, tmp_path / "export")
    shutil.copyfile(list_templates()["yulan-mini"], tmp_path / "export" / "chat_template.jinja")
    expected = open_model(str(tmp_path / "export")).answer([{"role": "user", "content": "Hello!"}], 64).text
    assert run_example("open_export", tmp_path / "export", "Hello!").rstrip("\n") == expected.rstrip("\n")
