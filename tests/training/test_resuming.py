"""What is left by a run that was killed at any moment is completed exactly, or the next start says why it cannot be."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import FinetuneError, OutputError, TrainingError
from finetune.files.safety import manifests
from finetune.files.safety.locks import lock_folder
from finetune.recipe.sections import OptimizerSection, Recipe
from finetune.runs.results import open_result
from finetune.runs.resuming import check_same_recipe
from finetune.runs.trainer_checkpoints import check_states, find_complete_checkpoint
from finetune.training import run as run_module
from finetune.training.journal import safeguards
from finetune.training.journal.safeguards import SignalWatch
from finetune.training.pretraining.packed_training import find_states
from finetune.training.run import run_training

SAVES = ["trainer.save_strategy=steps", "trainer.save_steps=2"]
# With a constant rate one step too many changes the weights; a schedule that ends at 0 hid it.
CONSTANT = [*SAVES, "trainer.lr_scheduler_type=constant"]


def read_weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_weights(first, second):
    assert set(first) == set(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def straight(train):
    return train("straight", *CONSTANT)


def read_record(run):
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def test_a_run_whose_last_checkpoint_holds_the_last_step_trains_no_step_more(straight, train):
    """32 of 285 killed runs were resumed for one step more than their recipe says."""
    resumed = train("resumed", *CONSTANT)
    shutil.rmtree(resumed / "adapter")
    train("resumed", *CONSTANT, resume=True)
    assert_same_weights(read_weights(straight), read_weights(resumed))
    record = read_record(resumed)
    assert record["status"] == "finished"
    assert record["result"]["steps"] == 4
    assert record["result"]["train_loss"] == read_record(straight)["result"]["train_loss"]


def test_tokens_are_counted_on(straight, train):
    """The count began again at 0 with every resumed run."""
    resumed = train("resumed", *CONSTANT)
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    train("resumed", *CONSTANT, resume=True)
    assert read_record(resumed)["result"]["tokens"] == read_record(straight)["result"]["tokens"]


def test_a_resumed_run_that_logs_nothing_has_no_mean_loss(train):
    """It was the mean of the steps since the checkpoint, and 0.0 where that was the last one."""
    quiet = [*CONSTANT, "trainer.logging_strategy=no"]
    run = train("run", *quiet)
    assert read_record(run)["result"]["train_loss"] > 1
    shutil.rmtree(run / "adapter")
    train("run", *quiet, resume=True)
    assert math.isnan(read_record(run)["result"]["train_loss"])


def test_a_run_killed_between_result_and_record_is_completed(straight, make_recipe, monkeypatch):
    """It said "this run has finished" for ever, with the status "running" and without a plot."""
    recipe = make_recipe("killed", *CONSTANT)

    def die(*arguments):
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "draw_losses", die)
        with pytest.raises(SystemExit):
            run_training(recipe)
    run = recipe.output
    assert read_record(run)["status"] == "saving"
    before = (run / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    summary = run_training(recipe, resume=True)
    assert read_record(run)["status"] == "finished"
    assert (run / "loss.png").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before  # nothing is trained again
    assert summary.steps == 4
    assert_same_weights(read_weights(straight), read_weights(run))
    with pytest.raises(TrainingError, match="this run has finished"):
        run_training(recipe, resume=True)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["gone", "empty", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_said(killed, tmp_path, name, harm, caplog, make_recipe):
    """Without these files the run went on as another one, and cut files were tracebacks."""
    run = tmp_path / "killed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(killed, run)
    file = run / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.unlink() if harm == "gone" else file.write_bytes(b"" if harm == "empty" else content)
    manifests._checked.clear()
    with caplog.at_level("WARNING", "finetune"):
        assert find_complete_checkpoint(run).name == "checkpoint-2"
    assert "checkpoint-4 is not whole" in caplog.text


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder as a killed run leaves it, with two checkpoints that hold what a trainer saves."""
    run = tmp_path_factory.mktemp("killed") / "run"
    for step in (2, 4):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in (
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "adapter_model.safetensors",
            "trainer_state.json",
        ):
            (folder / name).write_bytes(name.encode() * 20)
        manifests.write_manifest(folder)
    return run


def test_a_run_goes_on_from_the_newest_whole_checkpoint(straight, train, caplog):
    resumed = train("resumed", *CONSTANT)
    shutil.rmtree(resumed / "adapter")
    (resumed / "checkpoint-4" / "optimizer.pt").unlink()
    with (resumed / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "los')
    with caplog.at_level("WARNING", "finetune"):
        train("resumed", *CONSTANT, resume=True)
    assert "checkpoint-4 is not whole (optimizer.pt is missing)" in caplog.text
    assert_same_weights(read_weights(straight), read_weights(resumed))
    assert manifests.find_damage(resumed / "checkpoint-4") is None
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_no_whole_checkpoint_is_said(train, make_recipe):
    run = train("run", *CONSTANT)
    shutil.rmtree(run / "adapter")
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match="none of its checkpoints is whole"):
        run_training(make_recipe("run", *CONSTANT), resume=True)


def test_a_moved_run_is_resumed(straight, train, tmp_path):
    """It was refused: "the recipe has changed: output"."""
    moved = train("before", *CONSTANT).rename(tmp_path / "moved")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(moved / name)
    train("moved", *CONSTANT, resume=True)
    assert_same_weights(read_weights(straight), read_weights(moved))
    assert f"output: {moved}" in (moved / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_states_under_a_new_manifest_are_refused_where_they_are_damaged(tmp_path, name):
    """Of 1,500 bits flipped in the random numbers' state, 1,062 gave another state without a word, and 186 a traceback."""
    torch.save({"state": torch.arange(500), "name": [1, 2, (3, "four")]}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    check_states(tmp_path, [name])
    generator = random.Random(4)
    for _ in range(300):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (tmp_path / name).write_bytes(content)
        try:
            check_states(tmp_path, [name])
        except TrainingError as error:
            assert f"{name} is " in str(error)
            continue
        with contextlib.suppress(RuntimeError):  # the name of the archive is covered by no checksum; torch refuses it
            loaded = torch.load(tmp_path / name, weights_only=True)
            assert torch.equal(loaded["state"], torch.arange(500))
            assert loaded["name"] == [1, 2, (3, "four")]
    (tmp_path / name).unlink()
    with pytest.raises(TrainingError, match=f"{name} is missing, so the run could only go on as another one"):
        check_states(tmp_path, [name])


def test_a_run_does_not_go_on_without_its_random_numbers(train, make_recipe):
    """transformers goes on with other random numbers where their file is gone; a manifest written anew hid that."""
    run = train("resumed", *CONSTANT)
    shutil.rmtree(run / "adapter")
    (run / "checkpoint-4" / "rng_state.pth").unlink()
    (run / "checkpoint-4" / "manifest.json").unlink()
    manifests.write_manifest(run / "checkpoint-4")
    with pytest.raises(TrainingError, match=r"checkpoint-4: rng_state.pth is missing"):
        run_training(make_recipe("resumed", *CONSTANT), resume=True)


BEST = [*CONSTANT, "trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps", "trainer.eval_steps=2"]
# The loss falls, so the first checkpoint has the highest.
BEST += ["trainer.metric_for_best_model=loss", "trainer.greater_is_better=true", "trainer.learning_rate=1e-2"]


def test_a_moved_run_ends_with_its_best_weights(train, tmp_path, make_recipe):
    """The trainer names its best checkpoint by a path. After a move it found none, and the last weights were the result."""
    best = train("before", *BEST)
    expected = read_weights(best)
    assert_same_weights(expected, load_file(best / "checkpoint-2" / "adapter_model.safetensors"))
    moved = best.rename(tmp_path / "moved")
    shutil.rmtree(moved / "adapter")
    train("moved", *BEST, resume=True)
    assert_same_weights(expected, read_weights(moved))
    shutil.rmtree(moved / "adapter")
    (moved / "run.json").write_text((moved / "run.json").read_text().replace("finished", "running"))
    (moved / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    manifests._checked.clear()
    with pytest.raises(TrainingError, match=r"checkpoint-2: holds the best weights .* has 0 bytes where"):
        run_training(make_recipe("moved", *BEST), resume=True)


def test_a_moved_experiment_may_name_files_beside_its_runs(tmp_path):
    """The runs of a micro-annealing lie two folders below it and name its rows; after a move they were called another recipe."""
    file = tmp_path / "recipe.yaml"
    saved = "data:\n  eval:\n  - /a/exp/rows/held.parquet\n  train: '/a/mine.jsonl'\noutput: /a/exp/runs/old\n"
    file.write_text(saved)
    moved = saved.replace("/a/exp/", "/a/new/")
    check_same_recipe(file, moved, "run")
    assert file.read_text() == moved
    with pytest.raises(TrainingError, match="the recipe has changed"):
        check_same_recipe(file, moved.replace("held", "other"), "run")


def test_one_process_of_a_moved_launch_writes_the_recipe(tmp_path, monkeypatch):
    """Two processes wrote it at the same time, under one name; the slower one did not find its file."""
    file = tmp_path / "recipe.yaml"
    file.write_text("output: before\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", "output: before\n"), ("0", "output: now\n")):
        monkeypatch.setenv("RANK", rank)
        check_same_recipe(file, "output: now\n", "run")
        assert file.read_text() == expected


def test_a_base_that_vanishes_during_the_run_does_not_cost_the_result(make_recipe, nano_llama, tmp_path, monkeypatch):
    base = shutil.copytree(nano_llama, tmp_path / "base")
    recipe = make_recipe("run", f"model.checkpoint={base}")
    real = run_module._train

    def train_then_lose(*arguments):
        steps = real(*arguments)
        shutil.rmtree(base)
        return steps

    monkeypatch.setattr(run_module, "_train", train_then_lose)
    run_training(recipe)
    assert open_result(recipe.output).lineage.base == str(base)
    assert (recipe.output / "adapter" / "tokenizer.json").read_bytes() == (nano_llama / "tokenizer.json").read_bytes()


def test_a_base_that_is_written_over_during_the_run_ends_it(make_recipe, nano_llama, tmp_path, monkeypatch):
    """Weights are read from their file when they are needed: the run went on with other ones, and ended with exit 0."""
    base = shutil.copytree(nano_llama, tmp_path / "base")
    weights = base / "model.safetensors"
    saves = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.max_steps=3", "answers=0", "row_losses=0"]
    recipe = make_recipe("run", f"model.checkpoint={base}", *saves)
    seal = safeguards.CheckpointSeal.on_save

    def seal_then_write_over(callback, args, state, control, **kwargs):
        seal(callback, args, state, control, **kwargs)
        if state.global_step == 1:
            weights.touch()  # the content is as before, so the run goes on
        if state.global_step == 2:
            weights.write_bytes(bytes(weights.stat().st_size))

    monkeypatch.setattr(safeguards.CheckpointSeal, "on_save", seal_then_write_over)
    with pytest.raises(TrainingError, match=r"model\.safetensors: was written over while the run read it"):
        run_training(recipe)
    assert find_complete_checkpoint(recipe.output).name == "checkpoint-2"
    assert not (recipe.output / "adapter").exists()


def test_a_base_that_is_replaced_by_another_file_stays_as_it_was(nano_llama, tmp_path):
    base = shutil.copytree(nano_llama, tmp_path / "base")
    watch = safeguards.BaseWatch(base)
    (tmp_path / "new").write_bytes(b"other weights")
    (tmp_path / "new").replace(base / "model.safetensors")
    watch.on_save(None, None, None)
    shutil.rmtree(base)
    watch.on_train_end(None, None, None)


def test_a_second_run_into_one_output_is_refused_and_removes_nothing(make_recipe, tmp_path):
    """Both trained and interleaved their files; the one that failed deleted the folder of the other, with a user's file."""
    recipe = make_recipe("run")
    recipe.output.mkdir()
    with lock_folder(recipe.output):
        (recipe.output / "notes.txt").write_text("mine")
        error: list[BaseException] = []

        def start():
            try:
                run_training(recipe)
            except BaseException as raised:
                error.append(raised)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert isinstance(error[0], OutputError)
        assert "is using this folder" in str(error[0])
        assert (recipe.output / "notes.txt").read_text() == "mine"


def test_a_run_that_fails_removes_only_what_it_made(make_recipe, monkeypatch):
    recipe = make_recipe("run")

    def fail(*arguments):
        (recipe.output / "notes.txt").write_text("mine")
        raise FinetuneError("no step was trained")

    monkeypatch.setattr(run_module, "_train", fail)
    with pytest.raises(FinetuneError, match="no step was trained"):
        run_training(recipe)
    assert [path.name for path in recipe.output.iterdir()] == ["notes.txt"]


def test_an_empty_folder_of_the_user_stays(make_recipe):
    recipe = make_recipe("run", "data.max_tokens=8")
    recipe.output.mkdir()
    with pytest.raises(FinetuneError):
        run_training(recipe)
    assert list(recipe.output.iterdir()) == []


def test_a_damaged_result_is_not_used(straight):
    result = open_result(straight)
    file = straight / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    manifests._checked.clear()
    from finetune.models.opening import open_trained

    with pytest.raises(FinetuneError, match=r"is not as it was written: adapter_model.safetensors has other content"):
        open_trained(result)


def test_a_signal_whose_exception_was_lost_ends_the_run_at_the_next_step():
    """SystemExit within a callback of the garbage search is dropped: 1 of 135 runs went on."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # as if the exception had been dropped
    try:
        watch = SignalWatch()
        watch.on_train_begin(None, None, None)
        watch.on_step_end(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            watch.on_step_end(None, None, None)
        assert stopped.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_damaged_optimizer_state_that_a_run_has_saved_is_refused(tmp_path):
    """A flipped bit in saved moments was loaded without a word."""
    states = tmp_path / "model"
    states.mkdir()
    (states / "exp_avg.pt").write_bytes(b"moments")
    manifests.write_manifest(states)
    (states / "exp_avg.pt").write_bytes(b"momentt")
    recipe = Recipe(optimizer=OptimizerSection(states=str(tmp_path)))
    with pytest.raises(FinetuneError, match=r"is not as it was written: exp_avg\.pt has other content"):
        find_states(recipe)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("null", r"run\.json: must hold an object"),
        ("[]", r"run\.json: must hold an object"),
        ("{}", r"holds a result \(adapter\), .*\(its status is None"),
        (None, r"holds a result \(adapter\), .*\(its status is None"),
        ('{"status": "done"}', r"its status is 'done', and should be running, saving, finished\)"),
        ('{"status": "saving", "result": null}', r"run\.json: holds no summary of the result"),
        ('{"status": "saving", "result": {"steps": 4}}', r"run\.json: holds no summary of the result"),
    ],
)
def test_a_result_is_kept_where_its_record_says_nothing_of_it(make_recipe, record, fault):
    """A record of `null` counted as an empty one, and --resume removed the result of a finished run."""
    recipe = make_recipe("damaged", *CONSTANT)
    result = recipe.output / "adapter"
    result.mkdir(parents=True)
    (result / "adapter_model.safetensors").write_bytes(b"weights")
    (recipe.output / "recipe.yaml").write_text("", encoding="utf-8")
    if record is not None:
        (recipe.output / "run.json").write_text(record, encoding="utf-8")
    before = sorted(path.name for path in recipe.output.iterdir())
    with pytest.raises(TrainingError, match=fault):
        run_training(recipe, resume=True)
    assert (result / "adapter_model.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in recipe.output.iterdir()) == before
