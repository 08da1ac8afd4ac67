"""Whole chains on nano: one command, one folder, and the same export wherever they are killed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from finetune.check.chains import load_chain
from finetune.errors import DataError, TrainingError
from finetune.files.resources import find_demo_data
from finetune.pipeline.chain import ChainSummary, StageSummary, describe_chain, run_chain

CHAIN = """
model: {checkpoint: nano}
data: {train: rows.jsonl, max_tokens: 128}
adapter: {rank: 4, alpha: 8}
answers: 0
trainer:
  max_steps: 4
  learning_rate: 2e-3
  per_device_train_batch_size: 4
  save_steps: 2
  logging_steps: 1
  gradient_checkpointing: false
  disable_tqdm: true
stages:
  - name: first
  - {name: second, seed: 43, trainer: {learning_rate: 5e-3}}
  - {name: merged, export: {dtype: float32, gguf: [q8_0]}}
"""
# Stops the process as a power cut would, when the given stage has reached the given moment.
KILLED = """
import os, signal, sys
from finetune.pipeline import chain
from finetune.training import run as training
from finetune.check.chains import load_chain
from transformers import TrainerCallback

stage, moment, path, output = sys.argv[1:]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if os.path.basename(args.output_dir) == stage and state.global_step == 3:
            kill()

build = training.build_trainer

def build_and_stop(*arguments, **options):
    trainer = build(*arguments, **options)
    trainer.add_callback(Stop())
    return trainer

if moment == "step":
    training.build_trainer = build_and_stop
if moment == "export":
    chain.LogitVerifier.compare = kill
if moment == "record":
    chain.write_json = kill
if moment == "result":
    write = training.draw_losses

    def draw_and_stop(run, *arguments):
        if run.name == stage:
            kill()
        write(run, *arguments)

    training.draw_losses = draw_and_stop
chain.run_chain(load_chain(__import__("pathlib").Path(path), [f"output={output}"]))
"""


@pytest.fixture(scope="module")
def chain_file(tmp_path_factory, nano_llama):
    folder = tmp_path_factory.mktemp("chain")
    lines = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:16]), encoding="utf-8")
    path = folder / "chain.yaml"
    path.write_text(CHAIN, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(chain_file):
    """The output of the chain that nobody stopped."""
    return run_chain(load_chain(chain_file, [f"output={chain_file.parent / 'straight'}"]))


def hash_export(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("model*"))}


def test_a_chain_leaves_every_run_and_the_export(straight, chain_file):
    output = chain_file.parent / "straight"
    assert {path.name for path in output.iterdir()} == {"recipe.yaml", "chain.json", "first", "second", "merged"}
    assert [stage.name for stage in straight.stages] == ["first", "second", "merged"]
    assert not any(stage.was_done for stage in straight.stages)
    assert straight.export == str(output / "merged")
    names = {"model.safetensors", "model-q8_0.gguf", "model-q8_0.Modelfile"}
    assert hash_export(output / "merged").keys() == names
    assert [file["type"] for file in straight.stages[-1].result["gguf"]] == ["q8_0"]
    assert (output / "first" / "adapter").is_dir()
    assert json.loads((output / "merged" / "export.json").read_text())["verify"]["top1_agreement"] == 1.0
    # The second stage goes on from the first, and does something.
    first, second = (
        (output / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("first", "second")
    )
    assert first != second


@pytest.mark.parametrize(
    ("stage", "moment", "done"),
    [
        ("first", "step", []),
        ("first", "result", []),
        ("second", "step", ["first"]),
        ("merged", "export", ["first", "second"]),
        ("merged", "record", ["first", "second"]),
    ],
)
def test_killed_anywhere_and_resumed_it_is_the_same_export(straight, chain_file, tmp_path, stage, moment, done):
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, stage, moment, str(chain_file), str(output)]
    killed = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    times = {name: (output / name / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for name in done}
    resumed = run_chain(load_chain(chain_file, [f"output={output}"]), resume=True)
    assert [found.name for found in resumed.stages if found.was_done] == done
    assert times == {n: (output / n / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for n in done}
    assert hash_export(output / "merged") == hash_export(chain_file.parent / "straight" / "merged")
    assert not list(output.glob(".*"))


def test_a_finished_chain_is_not_run_again(straight, chain_file):
    output = chain_file.parent / "straight"
    again = run_chain(load_chain(chain_file, [f"output={output}"]), resume=True)
    assert all(stage.was_done for stage in again.stages)
    assert [stage.result for stage in again.stages][:2] == [stage.result for stage in straight.stages][:2]


def test_an_export_of_other_weights_is_made_again(straight, chain_file, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(chain_file.parent / "straight", output)
    record = json.loads((output / "chain.json").read_text())
    record["merged"]["weights"] = ["of another run"]
    (output / "chain.json").write_text(json.dumps(record))
    (output / "merged" / "model.safetensors").write_bytes(b"stale")
    again = run_chain(load_chain(chain_file, [f"output={output}"]), resume=True)
    assert [stage.was_done for stage in again.stages] == [True, True, False]
    assert hash_export(output / "merged") == hash_export(chain_file.parent / "straight" / "merged")


def test_a_chain_that_changed_is_not_gone_on_with(straight, chain_file, tmp_path):
    overrides = [f"output={chain_file.parent / 'straight'}", "stages.second.trainer.learning_rate=1e-4"]
    with pytest.raises(
        TrainingError, match=r"(?s)the recipe has changed since this chain started.*- learning_rate: 0.005"
    ):
        run_chain(load_chain(chain_file, overrides), resume=True)
    with pytest.raises(TrainingError, match="there is no chain to resume"):
        run_chain(load_chain(chain_file, [f"output={tmp_path / 'nothing'}"]), resume=True)


def test_two_processes_run_a_chain(straight, chain_file, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    command += ["-m", "finetune", "train", str(chain_file), "--json", "-s", f"output={tmp_path / 'two'}"]
    command += ["-s", "trainer.per_device_train_batch_size=2", "-s", "trainer.use_cpu=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["export"] == str(tmp_path / "two" / "merged")
    for stage, same in zip(found["stages"][:2], straight.stages[:2], strict=True):
        assert stage["result"]["train_loss"] == pytest.approx(same.result["train_loss"], abs=1e-4)


def test_a_bad_row_of_the_last_stage_is_told_before_the_first_trains(chain_file, tmp_path):
    (chain_file.parent / "bad.jsonl").write_text('{"prompt": "q", "completion": ""}\n', encoding="utf-8")
    overrides = [f"output={tmp_path / 'bad'}", "stages.second.data.train=bad.jsonl"]
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: completion is empty"):
        run_chain(load_chain(chain_file, overrides))
    assert not (tmp_path / "bad").exists()


def test_a_stage_that_had_finished_before_a_move_is_named_where_it_lies_now():
    result = {
        "run": "/old/1-sft",
        "steps": 3,
        "tokens": 30,
        "train_loss": 1.0,
        "eval_loss": None,
        "seconds": 2.0,
        "warnings": [],
    }
    text = describe_chain(ChainSummary("/new", [StageSummary("sft", "/new/1-sft", True, result)], None))
    assert text == "sft (finished before): /new/1-sft: 3 steps, training loss 1.000, 2 s"
