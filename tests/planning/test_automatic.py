"""`trainer.auto`: what it chooses, that it keeps the rows of a step, and that running out of memory changes no update."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from trl import SFTTrainer

from finetune.cli.main import main
from finetune.errors import MachineError, RecipeError, TrainingError
from finetune.pipeline.memory_ladder import list_steps_down, restore_choices, train_within_memory
from finetune.planning import automatic
from finetune.planning.automatic import choose_settings
from finetune.planning.changes import apply_change
from finetune.planning.forecast import Plan, Target
from finetune.recipe.batches import read_checkpointing
from finetune.recipe.recipe_file import ACCUMULATION, BATCH, read_recipe
from finetune.recipe.sections import dump_recipe
from finetune.runs.run_files import list_trainer_checkpoints

EVERY_4TH, EVERY_2ND = ({"gradient_checkpointing_kwargs": {"every_n_layers": every}} for every in (4, 2))
AUTO = ("sft_lora", "adapter.train_tokens=[]", "trainer.auto=true", "trainer.global_batch=12")


@pytest.fixture
def make_auto(make_recipe):
    """Return a function that makes an automatic recipe, which leaves everything open but the rows of a step."""

    def make(*overrides):
        return make_recipe(*AUTO, *overrides)

    return make


@pytest.fixture
def plan_by_formula(monkeypatch):
    """Plan 100 bytes, and a row's: 80 kept, 20 where all layers run twice, 5 where they are offloaded; less for 8-bit states."""

    def plan(recipe, target):
        trainer = recipe.recipe.trainer
        every = read_checkpointing(trainer)
        a_row = 5 if trainer.get("activation_offloading") else 80 - (60 // every if every else 0)
        fixed = 50 if "8bit" in str(trainer.get("optim", "")) else 100
        peak = fixed + a_row * trainer["per_device_train_batch_size"]
        values = dict.fromkeys(Plan.__dataclass_fields__, None)
        values |= {"peak_bytes": peak, "fits": peak <= target.memory_bytes, "memory_bytes": target.memory_bytes}
        return Plan(**values)

    monkeypatch.setattr(automatic, "make_plan", plan)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (
            10_000,
            {"gradient_checkpointing": False, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
        ),
        (430, {"gradient_checkpointing": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}),
        (180, {"gradient_checkpointing": False, "per_device_train_batch_size": 1}),
        (179, {"gradient_checkpointing": True, **EVERY_4TH, "per_device_train_batch_size": 1}),
        (164, {"gradient_checkpointing": True, **EVERY_2ND, "per_device_train_batch_size": 1}),
        (149, {"gradient_checkpointing": True, "per_device_train_batch_size": 2}),
        (119, {"activation_offloading": True, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}),
        (104, {"activation_offloading": True, "optim": "paged_adamw_8bit", "per_device_train_batch_size": 6}),
    ],
)
def test_as_little_as_needed_is_changed(make_auto, plan_by_formula, memory, expected):
    recipe, choices = choose_settings(make_auto(), Target(True, memory))
    chosen = recipe.recipe.trainer
    assert {key: chosen[key] for key in expected} == expected
    assert chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] == 12
    assert choices[-1].peak_bytes <= memory
    assert all(later.saves_bytes == before.peak_bytes - later.peak_bytes for before, later in pairwise(choices[:-1]))
    assert choose_settings(recipe, Target(True, 1)) == (recipe, ())  # what was chosen once stands


def test_what_the_recipe_says_is_kept(make_auto, plan_by_formula):
    recipe, _ = choose_settings(make_auto("trainer.optim=adamw_torch"), Target(True, 119))
    assert recipe.recipe.trainer["optim"] == "adamw_torch"
    # Only the rest of the split is open; it was raised to 12, and the run could not be resumed.
    begun, _ = choose_settings(make_auto(f"trainer.{BATCH}=2"), Target(True, 10_000))
    assert (begun.recipe.trainer[BATCH], begun.recipe.trainer[ACCUMULATION]) == (2, 6)
    fixed = make_auto("trainer.gradient_checkpointing=true")
    recipe, _ = choose_settings(fixed, Target(True, 10_000))
    assert recipe.recipe.trainer["gradient_checkpointing"] is True
    shared, _ = choose_settings(make_auto(), Target(True, 10_000, None, "ddp", 4))
    assert shared.recipe.trainer["per_device_train_batch_size"] == 3  # 12 rows by 4 processes


def test_what_cannot_be_chosen_is_said(make_auto, plan_by_formula):
    with pytest.raises(RecipeError, match="12 rows cannot be split evenly between 5 processes"):
        choose_settings(make_auto(), Target(True, 1000, None, "ddp", 5))
    with pytest.raises(MachineError, match="--memory 8GB"):
        choose_settings(make_auto(), Target(True))


def test_where_nothing_fits_other_changes_are_named(make_auto, plan_by_formula):
    """Levels that were tried are not named again; streaming is a change of the model, and keeps the training."""
    with pytest.raises(TrainingError) as refusal:
        choose_settings(make_auto(), Target(True, 54))
    first, *others = str(refusal.value).partition("other changes that need less memory\n  ")[2].split("\n  ")
    assert first.startswith("-s model.stream_layers=true: ")
    assert "alters" not in first
    assert others and all(line.endswith(" (alters the training)") for line in others)
    with pytest.raises(TrainingError, match=r"model\.quantize=nf4") as refusal:
        choose_settings(make_auto(), Target(True, 54, None, "ddp", 2))
    assert "stream_layers" not in str(refusal.value)


def test_a_recipe_may_say_no_more_than_auto(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {train: x.jsonl}\ntrainer: auto\n", encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml", ["trainer.learning_rate=1e-4"]).recipe.trainer == {
        "auto": True,
        "learning_rate": 1e-4,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.global_batch=4"], "trainer.global_batch: needs auto: true"),
        (["trainer.auto=yes"], "trainer.auto: must be true or false; found 'yes'"),
        (["trainer.auto=true", "trainer.global_batch=0"], "must be a whole number above 0"),
        (["trainer.atuo=true"], "did you mean 'auto'"),
    ],
)
def test_wrong_keys_are_refused(make_recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("sft_lora", *overrides)


def test_plan_resolves_auto_with_the_real_plan(capsys):
    """A shipped recipe says how its 16 rows are split, and `-s trainer.auto=true` changed nothing without a word."""
    command = ["plan", "sft_lora", "--memory", "2GB", "--json"]
    settings = ["model.checkpoint=nano", "data.max_tokens=128", "adapter.train_tokens=[]", "trainer.auto=true"]
    for setting in settings:
        command += ["-s", setting]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert [choice["settings"] for choice in plan["choices"]] == [
        {"gradient_checkpointing": False},
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    ]
    assert plan["fits"]


def test_what_the_command_line_asks_for_opens_the_split_of_the_file(make_recipe):
    opened = make_recipe("sft_lora", "trainer.learning_rate=1e-3", "trainer.auto=true").recipe.trainer
    assert opened["global_batch"] == 16 and not {BATCH, ACCUMULATION, "gradient_checkpointing"} & set(opened)
    said = make_recipe("sft_lora", f"trainer.{BATCH}=2", "trainer.global_batch=12", "trainer.auto=true").recipe.trainer
    assert (said["global_batch"], said[BATCH]) == (12, 2)


def test_a_split_that_the_recipe_makes_is_kept(make_auto, plan_by_formula):
    fixed = make_auto(f"trainer.{BATCH}=2", f"trainer.{ACCUMULATION}=6")
    recipe, choices = choose_settings(fixed, Target(True, 179))
    assert (recipe.recipe.trainer[BATCH], recipe.recipe.trainer[ACCUMULATION]) == (2, 6)
    assert [choice.settings for choice in choices] == [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, **EVERY_4TH},
        {"gradient_checkpointing": True, **EVERY_2ND},
        {"gradient_checkpointing": True},
    ]
    assert (
        choices[1]
        .describe()
        .startswith("gradient_checkpointing: true, gradient_checkpointing_kwargs: {every_n_layers: 4}: ")
    )
    with pytest.raises(
        RecipeError, match=r"global_batch: is 12, but .* make an effective batch size of 24 with 2 processes"
    ):
        choose_settings(fixed, Target(True, 1000, None, "ddp", 2))


def test_methods_that_compare_rows_begin_with_as_many(make_recipe, plan_by_formula):
    """KTO needs a micro-batch size of two, and was planned with one."""
    recipe, _ = choose_settings(make_recipe("kto_qlora", "trainer.auto=true"), Target(True, 179))
    assert recipe.recipe.trainer[BATCH] == 2
    steps = [change.settings for change in list_steps_down(recipe)]
    assert not any(f"trainer.{BATCH}" in settings for settings in steps)


ROWS = (
    'trainer: {auto: true, global_batch: 8, max_steps: 4, learning_rate: 2e-3, logging_steps: 1, save_strategy: "no", \
eval_strategy: "no", disable_tqdm: true, use_cpu: true}'
)


SAVING = ["-s", "trainer.save_strategy=steps", "-s", "trainer.save_steps=1"]


@pytest.fixture
def small_run(tmp_path, nano_llama):
    """A recipe file of four steps on nano, automatic, and a function that reads its losses."""
    from finetune.files.resources import find_demo_data

    lines = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    text = f"model: {{checkpoint: nano}}\ndata: {{train: rows.jsonl, max_tokens: 128}}\nadapter: {{rank: 4, alpha: 8}}\n{ROWS}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "recipe.yaml"


def read_losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def run_out_of_memory(monkeypatch, at_step, most_rows):
    """Raise from one step on as long as more rows are computed at once than fit."""
    compute = SFTTrainer.training_step

    def training_step(self, model, inputs, *arguments, **options):
        is_real = type(inputs["input_ids"]) is torch.Tensor  # a plan goes through here too
        if is_real and self.state.global_step >= at_step and len(inputs["input_ids"]) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has more to say.")
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)


def train(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, arguments), "--json"])
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


def test_the_ladder_changes_no_update(small_run, tmp_path, monkeypatch, capsys, caplog):
    """Out of memory before and after the first checkpoint: a smaller micro-batch size, and the losses of an undisturbed run."""
    code, out, _ = train(capsys, small_run, "-s", f"output={tmp_path / 'plain'}")
    assert code == 0 and "trainer.auto chose" in caplog.text
    expected = read_losses(json.loads(out)["run"])
    run_out_of_memory(monkeypatch, at_step=2, most_rows=2)
    for name, saving in (("saved", SAVING), ("fresh", [])):
        caplog.clear()
        code, _, _ = train(capsys, small_run, "-s", f"output={tmp_path / name}", *saving)
        assert code == 0
        steps = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
        assert len(steps) == 2  # micro-batch size 8, then 4, then 2
        for step in steps:
            assert step.startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); ")
            assert ("continuing with" in step) == bool(saving) and "effective batch size stays 8 rows" in step
        assert read_losses(tmp_path / name) == pytest.approx(expected, abs=1e-4)
        resolved = read_recipe(tmp_path / name / "recipe.yaml").recipe.trainer
        assert (resolved["per_device_train_batch_size"], resolved["gradient_accumulation_steps"]) == (2, 4)
    resume_by_both_recipes(capsys, small_run, tmp_path / "saved")


def resume_by_both_recipes(capsys, small_run, run):
    """Resume a run from its first checkpoint by the recipe that it was started with, and then by its own.

    Every stopped run of `trainer.auto` was refused: what it had chosen stood in another place of the recipe.
    """
    for recipe, given in ((small_run, ["-s", f"output={run}", *SAVING]), (run / "recipe.yaml", [])):
        shutil.rmtree(run / "adapter")
        for checkpoint in list_trainer_checkpoints(run)[:-1]:
            shutil.rmtree(checkpoint)
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        (run / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
        status, _, err = train(capsys, recipe, *given, "--resume")
        assert status == 0, err


def test_a_run_that_stepped_down_goes_on_as_it_is(make_recipe, tmp_path):
    """Its recipe, which said 4 x 2, was taken for a changed one, and a chain with it could not be resumed."""
    split = [f"trainer.{BATCH}=4", f"trainer.{ACCUMULATION}=2", "trainer.gradient_checkpointing=false"]
    recipe = make_recipe("sft_lora", "trainer.auto=true", *split, f"output={tmp_path}")
    smaller = {BATCH: 2, ACCUMULATION: 4, "gradient_checkpointing": True}
    saved = recipe.change_trainer(**smaller)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(saved.recipe), encoding="utf-8")
    assert restore_choices(recipe) == saved
    some = recipe.change_trainer(gradient_checkpointing=True, **EVERY_2ND)
    (step,) = (change for change in list_steps_down(some) if "checkpointing" in change.reason)
    assert step.describe().startswith("-s 'trainer.gradient_checkpointing_kwargs={every_n_layers: 1}': ")
    saved = apply_change(some, step).change_trainer(**{BATCH: 2, ACCUMULATION: 4})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(saved.recipe), encoding="utf-8")
    assert restore_choices(some) == saved
    other = recipe.change_trainer(**{ACCUMULATION: 3})
    assert restore_choices(other).recipe.trainer[ACCUMULATION] == 3  # another number of rows is another run


def test_without_auto_the_message_says_what_grew(small_run, tmp_path, monkeypatch, capsys):
    run_out_of_memory(monkeypatch, at_step=0, most_rows=0)
    recipe = choose_settings(read_small(small_run, tmp_path), Target(False, 10**12))[0].change(
        trainer={"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True}
    )
    with pytest.raises(
        TrainingError,
        match=r"(?s)out of memory \(CUDA.*rows half as long would save .* of activations kept.*trainer.auto=true",
    ):
        train_within_memory(recipe)
    assert not (tmp_path / "run").exists()


def read_small(path, folder):
    from finetune.check.recipes import load_recipe

    return load_recipe(path, [f"output={folder / 'run'}"])


def test_steps_down_keep_the_rows(make_recipe):
    batch = ("trainer.per_device_train_batch_size=6", "trainer.gradient_accumulation_steps=2")
    recipe = make_recipe("sft_lora", *batch, "trainer.gradient_checkpointing=false")
    steps = [change.settings for change in list_steps_down(recipe)]
    assert steps[0] == {"trainer.per_device_train_batch_size": 4, "trainer.gradient_accumulation_steps": 3}
    assert steps[1] == {"trainer.gradient_checkpointing": True}
    assert len(steps) == 2 + torch.cuda.is_available()
