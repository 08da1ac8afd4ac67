"""How often a run logs: its curve has points, however short the run is."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.check.recipes import load_recipe
from finetune.errors import FinetuneError
from finetune.training.journal.progress import ShortRunLogging, restore_lines
from finetune.training.journal.safeguards import CheckpointSeal
from finetune.training.run import run_training


@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (39, 1), (40, 2), (199, 9), (200, 10), (5000, 10)])
def test_a_short_run_has_twenty_points_or_one_for_each_step(tmp_path, steps, interval):
    state = TrainerState(max_steps=steps, logging_steps=10)
    ShortRunLogging().on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl())
    assert state.logging_steps == interval


def test_a_run_of_three_steps_has_a_curve(make_recipe, tmp_path):
    """TRL's default is every ten steps, so that the file, the plot and the page were empty."""
    make_recipe("unused")
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("  logging_steps: 1\n", ""), encoding="utf-8")
    run = Path(run_training(load_recipe(file, [f"output={tmp_path / 'run'}", "trainer.max_steps=3"])).run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.save_strategy=steps", "trainer.save_steps=4", "trainer.eval_strategy=epoch", "trainer.logging_steps=3"],
        ["trainer.save_strategy=epoch", "trainer.eval_on_start=true", "trainer.eval_strategy=epoch", "trainer.logging_steps=50"],
        ["trainer.save_strategy=steps", "trainer.save_steps=4", "trainer.logging_strategy=epoch"],
    ],
)  # fmt: skip
def test_a_run_killed_at_the_end_of_an_epoch_lacks_nothing_when_it_goes_on(make_recipe, train, monkeypatch, overrides):
    """The epoch's evaluation was lost, and later steps drew other random numbers; a loss was the mean over other steps."""
    settings = ["adapter.dropout=0.1", "trainer.max_steps=6", "trainer.lr_scheduler_type=constant", *overrides]
    straight = train("straight", *settings)
    with (
        killed_at(monkeypatch, 4),
        pytest.raises(SystemExit),
    ):  # 32 rows in batches of 8: the last step of the first epoch
        run_training(make_recipe("killed", *settings))
    killed = train("killed", *settings, resume=True)
    check_same_run(killed, straight)


def test_a_run_killed_while_it_counts_evaluations_stops_where_it_would_have_stopped(make_recipe, train, monkeypatch):
    """The count began anew, and a run that was killed after its last checkpoint went on to train."""
    settings = [
        "trainer.max_steps=6",
        "trainer.early_stopping_patience=2",
        "trainer.load_best_model_at_end=true",
        "trainer.greater_is_better=true",  # the loss falls, so that no evaluation after the first is better
        "trainer.metric_for_best_model=eval_loss",
        *(f"trainer.{name}_strategy=steps" for name in ("eval", "save")),
        *(f"trainer.{name}_steps=1" for name in ("eval", "save")),
    ]
    straight = train("straight", *settings)
    assert read_metrics(straight)[-1]["step"] == 3
    for step in (2, 3):
        with killed_at(monkeypatch, step), pytest.raises(SystemExit):
            run_training(make_recipe(f"killed {step}", *settings))
        check_same_run(train(f"killed {step}", *settings, resume=True), straight)


def test_a_run_whose_files_were_removed_goes_on_and_says_what_is_lost(make_recipe, train, caplog):
    """Curves began at the checkpoint; without answers.json the run ended in a traceback after its last step; nothing was said."""
    settings = [
        "trainer.max_steps=4",
        *(f"trainer.{name}_strategy=steps" for name in ("eval", "save")),
        *(f"trainer.{name}_steps=2" for name in ("eval", "save")),
        "answers=4",
        "row_losses=2",
    ]
    run = train("run", *settings)
    metrics, answers = read_metrics(run), json.loads((run / "answers.json").read_text(encoding="utf-8"))
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    for folder in ("adapter", "checkpoint-4"):
        shutil.rmtree(run / folder)
    removed = ("metrics.jsonl", "machine.jsonl", "answers_by_step.jsonl", "answers.json", "row_losses.json")
    (run / "row_losses.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(FinetuneError, match=r"row_losses\.json: is not as it was written"):
        train("run", *settings, resume=True)
    for name in removed:
        (run / name).unlink()
    caplog.clear()
    train("run", *settings, resume=True)
    assert read_metrics(run) == metrics
    assert not [name for name, weight in load_file(run / "adapter" / "adapter_model.safetensors").items() if not torch.equal(weight, weights[name])]  # fmt: skip
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(sum(str(run / name) in text for text in said) == 1 for name in removed), said
    assert f"{run / 'metrics.jsonl'}: lacked 3 lines, written again from the checkpoint's history" in said
    kept = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert kept == [{**one, "before": None} for one in answers]
    assert "    (not known)" in (run / "answers.md").read_text(encoding="utf-8")
    assert all(row["before"] is None for row in json.loads((run / "row_losses.json").read_text())["rows"])
    assert [json.loads(line)["step"] for line in (run / "answers_by_step.jsonl").read_text().splitlines()] == [4]


def test_lines_that_a_file_of_metrics_lacks_are_restored_in_their_order(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = [
        '{"step": 1, "loss": 2.0}\n',
        '{"step": 1, "eval_loss": NaN, "more": 1}\n',
        '{"step": 2, "loss": 0.1}\n',
    ]
    history = [
        {"preflight_loss": 3.0, "step": 0},
        {"loss": 2.0, "step": 1},
        {"eval_loss": float("nan"), "step": 1},
        {"loss": 0.1, "step": 2},
    ]
    file.write_text("".join(whole))
    restore_lines(file, history)
    assert file.read_text() == "".join(whole)
    file.write_text(whole[1] + '{"step": 2, "other": 7}\n')
    restore_lines(file, history)
    assert file.read_text() == "".join([*whole, '{"step": 2, "other": 7}\n'])


@contextlib.contextmanager
def killed_at(monkeypatch, step):
    """End a run when the checkpoint of a step is sealed."""
    seal = CheckpointSeal.on_save

    def die(self, args, state, control, **values):
        seal(self, args, state, control, **values)
        if state.global_step == step:
            raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointSeal, "on_save", die)
        yield


def check_same_run(one, other):
    """Check that two runs have the same metrics, summary and adapter."""
    assert read_metrics(one) == read_metrics(other)
    results = [json.loads((run / "run.json").read_text(encoding="utf-8"))["result"] for run in (one, other)]
    assert len({json.dumps({**result, "run": "", "seconds": 0}) for result in results}) == 1
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert not [name for name, weight in weights[0].items() if not torch.equal(weight, weights[1][name])]


def read_metrics(run):
    """Return what was logged, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(("runtime", "second"))} for line in lines]
