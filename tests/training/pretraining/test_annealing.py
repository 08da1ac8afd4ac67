"""`finetune train` with `method: anneal` goes on from states that DeepSpeed wrote as DeepSpeed itself did."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import TrainerCallback

from finetune.check.recipes import load_recipe
from finetune.files.resources import find_resource_folder
from finetune.training.run import run_training
from finetune.training.trainer import build_trainer
from finetune.yulan.states.optimizer_states import open_states, read_state

RECIPE = """
method: anneal
model: {checkpoint: case, architecture: native, attention: eager}
data: {train: rows.jsonl, max_tokens: 32}
adapter: {kind: none}
schedule: {count: states, length: 5, decay: none}
trainer:
  per_device_train_batch_size: 4
  train_sampling_strategy: sequential
  logging_steps: 1
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""
DECAY = ["schedule.decay=1-sqrt", "schedule.decay_start=10", "schedule.decay_end=30"]


def write_tokenizer(folder):
    """Give a folder the special tokens at their real ids, and a word for each other one of 512."""
    special = {0: "<unk>", 1: "<s>", 2: "</s>", 102: "<pad>", 104: "<|start_header_id|>", 105: "<|end_header_id|>"}
    words = {special.get(number, "<|eot_id|>" if number == 106 else f"w{number}"): number for number in range(512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens([*special.values(), "<|eot_id|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def expected(shared):
    return json.loads((shared / "reference" / "universal" / "expected.json").read_text())


@pytest.fixture
def make_recipe(shared, tmp_path):
    """Return a function that checks the recipe for a case; its rows are those of steps 11 to 15."""
    root = shared / "reference" / "universal"
    batches = load_file(root / "batches.safetensors")["input_ids"]
    rows = [json.dumps({"input_ids": row}) for row in batches[10:].flatten(0, 1).tolist()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make(case, name, *overrides):
        folder = tmp_path / case
        if not folder.is_dir():
            shutil.copytree(root / case, folder, copy_function=shutil.copyfile)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755)
            write_tokenizer(folder)
        dtype = "float32" if "fp32" in case else "bfloat16"
        settings = [f"model.checkpoint={folder}", f"model.dtype={dtype}", f"output={tmp_path / name}"]
        return load_recipe(tmp_path / "recipe.yaml", [*settings, *overrides])

    return make


@pytest.fixture
def anneal(make_recipe):
    """Return a function that trains the recipe for a case and gives its run directory."""

    def run(case, name, *overrides, resume=False):
        return Path(run_training(make_recipe(case, name, *overrides), resume).run)

    return run


def read_metrics(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.mark.parametrize("case", ["case", "case_fp32"])
@pytest.mark.parametrize("schedule", ["stable", "1sqrt"])
def test_annealing_goes_on_as_deepspeed_did(anneal, expected, shared, case, schedule):
    run = anneal(case, "run", "optimizer.save_states=true", *(DECAY if schedule == "1sqrt" else []))
    rows = expected["cases"][case]["after_resume"][schedule]
    tolerance = expected["tolerance"]["case_fp32" if case == "case_fp32" else f"case_{schedule}"]
    assert read_metrics(run, "loss") == pytest.approx([row["loss"] for row in rows], abs=tolerance)
    assert read_metrics(run, "grad_norm") == pytest.approx([row["grad_norm"] for row in rows], abs=1e-4)
    assert read_metrics(run, "learning_rate") == pytest.approx([row["lr"][0] for row in rows])
    states = open_states(run / "model")
    assert states.step == 15
    if schedule == "stable":  # the uninterrupted run, whose end was kept, had no decay
        final = load_file(shared / "reference" / "universal" / f"expected_final_{case}.safetensors")
        for name, shape in states.shapes.items():
            state = read_state(states, name, torch.Size(shape))
            for part, tensor in (("fp32", state.weight), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
                difference = (tensor - final[f"{part}/{name}"].reshape(shape)).abs().max()
                limit = 1e-5 if case == "case_fp32" else {"fp32": 5e-3, "exp_avg": 5e-5, "exp_avg_sq": 2e-6}[part]
                assert difference <= limit, (part, name)


class Stop(TrainerCallback):
    """Ends a run, as a person would, one step after the last that was saved."""

    def __init__(self, saved):
        self.saved = saved

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.saved + 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("case", ["case", "case_fp32"])
def test_a_stopped_run_goes_on_bit_for_bit(anneal, monkeypatch, case):
    overrides = [*DECAY, "optimizer.save_states=true", "trainer.save_strategy=steps", "trainer.save_steps=1"]
    straight = anneal(case, "straight", *overrides)
    saved = random.randint(1, 3)
    print(f"stopped after step {saved}")  # pytest shows it where the test fails

    def build_and_stop(*arguments):
        trainer = build_trainer(*arguments)
        trainer.add_callback(Stop(saved))
        return trainer

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("finetune.training.run.build_trainer", build_and_stop)
        anneal(case, "resumed", *overrides)
    resumed = anneal(case, "resumed", *overrides, resume=True)
    first, second = load_file(straight / "model/model.safetensors"), load_file(resumed / "model/model.safetensors")
    assert first.keys() == second.keys()
    states, again = open_states(straight / "model"), open_states(resumed / "model")
    for name, shape in states.shapes.items():
        assert torch.equal(first[name], second[name])
        one, other = (read_state(opened, name, torch.Size(shape)) for opened in (states, again))
        assert all(torch.equal(vars(one)[part], vars(other)[part]) for part in ("weight", "exp_avg", "exp_avg_sq"))
    assert read_metrics(straight, "loss") == read_metrics(resumed, "loss")


@pytest.mark.parametrize("case", ["case", "case_fp32"])
def test_two_processes_that_share_every_tensor_go_on_alike(make_recipe, expected, tmp_path, case):
    make_recipe(case, "run")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(find_resource_folder("recipes") / "accelerate" / "fsdp2.yaml"), "-m", "finetune"]
    command += ["train", str(tmp_path / "recipe.yaml"), "-s", f"model.checkpoint={tmp_path / case}"]
    dtype = "float32" if case == "case_fp32" else "bfloat16"
    for override in (f"model.dtype={dtype}", f"output={tmp_path / 'run'}", "trainer.per_device_train_batch_size=2"):
        command += ["-s", override]
    done = subprocess.run([*command, "-s", "optimizer.save_states=true"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "x 2 processes, FSDP2)" in done.stderr
    rows = expected["cases"][case]["after_resume"]["stable"]
    assert read_metrics(tmp_path / "run", "loss") == pytest.approx([row["loss"] for row in rows], abs=5e-4)
    assert open_states(tmp_path / "run" / "model").step == 15
