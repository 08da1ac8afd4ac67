"""Whole small runs: what they leave, that batches add up, that resuming is exact, that nothing starts broken."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.data.encoding.rendering import encode_conversations
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import FinetuneError, OutputError, RecipeError, TrainingError
from finetune.files.resources import find_demo_data, find_resource_folder
from finetune.recipe.recipe_file import read_recipe
from finetune.runs.results import open_result
from finetune.training.run import run_training

UNLOGGED = ["trainer.logging_strategy=no"]


def read_weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_weights(first, second):
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_a_run_leaves_what_later_stages_need(train, nano_llama):
    run = train("run", "trainer.eval_strategy=epoch")
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "machine.jsonl",
        "loss.png",
        "report.html",
        "adapter",
    }
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"]["train"]["rows"] == 32
    assert record["data"]["evaluation"]["rows"] == 8
    assert record["result"]["steps"] == 4
    assert record["versions"]["trl"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert record["result"]["train_loss"] == lines[3]["loss"]
    assert record["result"]["eval_loss"] == next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line)
    assert record["result"]["tokens"] == record["data"]["train"]["tokens"]  # 4 steps of 8 rows are one epoch
    # The run's own recipe gives the same run again.
    assert not read_recipe(run / "recipe.yaml").problems
    result = open_result(run)
    assert result.lineage.base == str(nano_llama)
    assert len(result.rows) == 8


def test_the_adapter_has_the_parameters_of_the_formula(train):
    weights = read_weights(train("run", "trainer.max_steps=1"))
    # rank x (inputs + outputs) of q, k, v, o, gate, up, down, in each of 4 layers.
    linear = [(320, 320), (320, 64), (320, 64), (320, 320), (320, 800), (320, 800), (800, 320)]
    assert sum(tensor.numel() for tensor in weights.values()) == 4 * 4 * sum(i + o for i, o in linear)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_accumulation_does_not_change_the_losses(train, read_losses):
    # Rows differ in length, so a mean of means would differ.
    whole = read_losses(train("8x1"))
    parts = read_losses(train("1x8", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=8"))
    assert len(whole) == 4
    assert parts == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.dropout=0.1"],
        ["adapter.init=pissa"],
        ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.learning_rate=1e-3"],
        ["model.quantize=nf4", "adapter.modules_to_save=[embed_tokens,lm_head,norm]"],
        ["model.architecture=native", "adapter.kind=none", "adapter.rank=16", "adapter.alpha=32"],
    ],
    ids=["lora-with-dropout", "pissa", "full", "nf4", "native"],
)
def test_resuming_is_bit_for_bit_the_same_run(train, make_recipe, overrides):
    overrides = [*overrides, "trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=3"]
    straight = train("straight", *overrides)
    resumed = train("resumed", *overrides)
    # As if it had been killed between step 3 and the end: the later checkpoint and the result are not there.
    for name in ("adapter", "model", "checkpoint-6"):
        shutil.rmtree(resumed / name, ignore_errors=True)
    train("resumed", *overrides, resume=True)
    kind = "model" if (straight / "model").is_dir() else "adapter"
    files = sorted(path.name for path in (straight / kind).glob("*.safetensors"))
    assert files
    for name in files:
        assert_same_weights(load_file(straight / kind / name), load_file(resumed / kind / name))
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_rows_that_changed_meanwhile_are_noticed(train, make_recipe, tmp_path):
    overrides = ["trainer.save_strategy=steps", "trainer.save_steps=2"]
    shutil.rmtree(train("run", *overrides) / "adapter")
    recipe = make_recipe("run", *overrides)
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join([*rows[1:], rows[0]]), encoding="utf-8")
    with pytest.raises(TrainingError, match="the rows changed since this run started"):
        run_training(recipe, resume=True)


def test_a_checkpoint_that_was_cut_off_is_passed_over(train):
    """A run killed while it wrote a checkpoint could not be resumed at all: its newest folder lacks the trainer's state."""
    overrides = ["trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    straight, resumed = train("straight", *overrides), train("resumed", *overrides)
    shutil.rmtree(resumed / "adapter")
    (resumed / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1.0, "glo')
    train("resumed", *overrides, resume=True)
    assert_same_weights(read_weights(straight), read_weights(resumed))


def test_the_same_recipe_gives_the_same_weights(train):
    assert_same_weights(read_weights(train("first")), read_weights(train("second")))


def test_resuming_another_recipe_is_refused(train, make_recipe):
    train("run", "trainer.save_strategy=steps", "trainer.save_steps=2")
    with pytest.raises(TrainingError, match="this run has finished"):
        run_training(make_recipe("run"), resume=True)
    with pytest.raises(OutputError, match=r"is not empty.*--resume"):
        run_training(make_recipe("run"))


def test_a_changed_recipe_is_refused_by_line(train, make_recipe, tmp_path):
    run = train("run", "trainer.save_strategy=steps", "trainer.save_steps=2")
    (run / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match=r"(?s)has changed.*- rank: 4.*\+ rank: 8"):
        run_training(
            make_recipe("run", "adapter.rank=8", "trainer.save_strategy=steps", "trainer.save_steps=2"), resume=True
        )


def test_nothing_to_resume_is_said(make_recipe, tmp_path):
    with pytest.raises(TrainingError, match="there is no run to resume"):
        run_training(make_recipe("run"), resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.max_tokens=8"], FinetuneError, "are longer than data.max_tokens: 8"),
        (["data.max_tokens=8", "data.overflow=drop"], FinetuneError, "no row is left for training"),
        (["adapter.train_tokens=[5000]"], TrainingError, r"\[5000\] lie outside the embedding table of 1,312 tokens"),
        (["trainer.save_strategy=best"], RecipeError, r"trainer\.save_strategy: needs evaluations"),
        (
            ["model.quantize=int8", "adapter.dora=true"],
            RecipeError,
            "adapter.dora: cannot be trained on int8 weights on a CPU",
        ),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(make_recipe, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        run_training(make_recipe("run", *overrides))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(make_recipe):
    with pytest.raises(
        TrainingError, match=r"the training loss is (nan|inf); lower .*; the run has saved no checkpoint yet$"
    ):
        run_training(
            make_recipe("run", "trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "trainer.max_steps=20")
        )


def test_packing_trains_the_same_tokens_as_separate_rows(train, read_losses):
    """Packed rows must not see each other: regression guard for position ids without flash attention."""
    apart = read_losses(train("apart", "trainer.max_steps=1", "trainer.per_device_train_batch_size=32"))
    packed = read_losses(
        train("packed", "trainer.max_steps=1", "trainer.per_device_train_batch_size=32", "trainer.packing=true")
    )
    assert packed == pytest.approx(apart, abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch_gives_the_same_losses(train, make_recipe, tmp_path, read_losses, processes):
    expected = read_losses(train("plain"))
    recipe = tmp_path / "recipe.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    two = ["--config_file", str(find_resource_folder("recipes") / "accelerate" / "cpu.yaml")]
    one = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += two if processes == 2 else one
    command += ["-m", "finetune", "train", str(recipe), "-s", f"output={tmp_path / 'launched'}", "--json"]
    command += ["-s", f"trainer.per_device_train_batch_size={8 // processes}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    assert f"x {processes} process" in done.stderr
    assert read_losses(tmp_path / "launched") == pytest.approx(expected, abs=1e-4)


def test_the_model_learns_and_stops_by_itself(train, tmp_path):
    from finetune.models.opening import open_model

    lines = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (tmp_path / "few.jsonl").write_text("".join(lines), encoding="utf-8")
    overrides = ["data.train=few.jsonl", "trainer.max_steps=80", "adapter.rank=32", "adapter.alpha=64", *UNLOGGED]
    loaded = open_model(str(train("run", *overrides)))
    rows = [json.loads(line) for line in lines]
    question, expected = rows[0]["messages"][-2:]
    found = loaded.answer([*rows[0]["messages"][:-2], question], 64)
    assert found.stopped_by == "<|eot_id|>"
    assert found.text == expected["content"]


def test_the_tokens_that_are_trained_are_those_of_the_preview(make_recipe, nano_llama):
    from finetune.training.training_rows import prepare_rows

    _, splits = prepare_rows(make_recipe("run"))
    tokenizer = load_tokenizer(nano_llama)
    template = find_template("auto", tokenizer)
    first = json.loads(find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines()[0])
    encoded = encode_conversations(tokenizer, template, [first["messages"]])[0]
    assert splits.train[0]["input_ids"] == encoded.token_ids
    assert [label != -100 for label in splits.train[0]["labels"]] == encoded.trained


def test_the_adapter_of_a_quantized_base_stays_in_float32(make_recipe, tmp_path):
    """TRL rounds it to bfloat16, where most steps of a usual size are lost (peft 2889, trl 7268)."""
    run = Path(run_training(make_recipe("run", "model.quantize=nf4", "trainer.learning_rate=1e-6")).run)
    weights = read_weights(run)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    starts = [tensor for name, tensor in weights.items() if "lora_A" in name]
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in starts)


def test_a_run_shorter_than_one_logged_step_reports_its_mean_loss(train):
    """It used to report `nan`, as if it had failed."""
    often, seldom = (
        train(f"every{steps}", "trainer.max_steps=1", f"trainer.logging_steps={steps}") for steps in (1, 50)
    )
    line = json.loads((often / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    record = json.loads((seldom / "run.json").read_text(encoding="utf-8"))
    assert record["result"]["train_loss"] == pytest.approx(line["loss"], rel=1e-6)
