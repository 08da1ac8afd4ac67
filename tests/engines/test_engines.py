"""Every engine trains what one process does: DDP, FSDP2, ZeRO-2 and ZeRO-3, two processes on the CPU. `make engines` runs them.

DeepSpeed lies in an environment of its own, which `tests/runtimes/environments.py deepspeed` builds. Each case takes about 15 s of
CPU time, so they are no part of `make test`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.resources import find_demo_data, find_resource_folder
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

sys.path.insert(0, str(Path(__file__).parents[1] / "runtimes"))
from environments import find_python

START = Path(__file__).parent / "start.py"
CONFIGS = find_resource_folder("recipes") / "accelerate"
FILES = {"ddp": "cpu", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
FULL = ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.learning_rate=1e-3"]
PAIRS = [
    f"data.train={find_demo_data('pairs.jsonl')}",
    "data.eval=[]",
    "data.held_out=8",
    "data.max_tokens=256",
    "method=dpo",
]
CASES = {"lora": [], "nf4": ["model.quantize=nf4"], "full": FULL, "dpo": PAIRS}
EVALUATE = ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.per_device_eval_batch_size=3"]
SAVE = ["trainer.save_strategy=steps", "trainer.save_steps=2"]
ADAPTER, MODEL = Path("adapter/adapter_model.safetensors"), Path("model/model.safetensors")
# What DeepSpeed's own file says; everything that the recipe decides is left to it.
DEEPSPEED = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
}

pytestmark = pytest.mark.skipif(not os.environ.get("FINETUNE_ENGINES"), reason="takes minutes; run `make engines`")


def find_port():
    """Return a free port, so that runs of this file do not meet."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def launch(make_recipe, tmp_path):
    """Return a function that trains the small recipe in two processes; it gives the run directory and what was printed."""

    def run(engine, name, *overrides, resume=False, file=None):
        make_recipe(name)  # writes recipe and rows
        python, variables = Path(sys.executable), dict(os.environ)
        if engine.startswith("zero"):
            python = find_python("deepspeed")
            assert python is not None, "run python tests/runtimes/environments.py deepspeed"
            variables |= {"FINETUNE_BORROWED": sysconfig.get_path("purelib"), "DS_ACCELERATOR": "cpu"}
            variables["PYTHONPATH"] = str(Path(__file__).parents[2])
        command = [
            python,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            file or CONFIGS / f"{FILES[engine]}.yaml",
        ]
        command += [
            "--main_process_port",
            find_port(),
            START,
            "train",
            tmp_path / "recipe.yaml",
            *(["--resume"] if resume else []),
        ]
        for override in (f"output={tmp_path / name}", "trainer.per_device_train_batch_size=4", *overrides):
            command += ["-s", override]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=variables)
        return tmp_path / name, done

    return run


def read(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def export(run, folder):
    report = export_result(open_result(run), folder, ExportSettings("float32", "1GB"), LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", FILES)
def test_two_processes_train_and_export_what_one_does(launch, make_recipe, tmp_path, engine, case):
    settings = [*CASES[case], *EVALUATE, *SAVE]
    run_training(make_recipe("alone", *settings))
    run, done = launch(engine, "shared", *settings)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert (record["engine"], record["processes"]) == (engine, 2)
    alone = tmp_path / "alone"
    found = {key: max(map(abs_difference, read(alone, key), read(run, key))) for key in ("loss", "eval_loss")}
    expected, exported = export(alone, tmp_path / "one"), export(run, tmp_path / "two")
    assert set(exported) == set(expected)
    found["export"] = max(float((exported[name] - expected[name]).abs().max()) for name in expected)
    print(f"\n{engine} {case}: {found}")  # the figures of docs/several-gpus.md
    assert found["loss"] <= 1e-4 and found["eval_loss"] <= 1e-4
    assert found["export"] <= 1e-3
    check_resuming(launch, engine, run, settings)


def abs_difference(first, second):
    return abs(first - second)


def check_resuming(launch, engine, run, settings):
    """Two processes continue from step 2 to the same weights, in a folder to which the run was moved."""
    file = next(path for path in (ADAPTER, MODEL) if (run / path).is_file())
    straight = load_file(run / file)
    for folder in (file.parent, "checkpoint-4"):
        for path in sorted((run / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (run / folder).rmdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    run = run.rename(run.with_name("moved"))
    _, done = launch(engine, run.name, *settings, resume=True)
    assert done.returncode == 0, done.stderr
    resumed = load_file(run / file)
    difference = max(float((straight[name] - resumed[name]).abs().max()) for name in straight)
    print(f"{engine} resumed: {difference}")
    assert difference <= 1e-6


def test_a_file_of_deepspeed_decides_the_stage(launch, tmp_path):
    """ZeRO-3 from a file was taken for ZeRO-2, and the run ended with status 0 and empty tensors."""
    (tmp_path / "zero3.json").write_text(json.dumps(DEEPSPEED))
    config = (CONFIGS / "zero3.yaml").read_text(encoding="utf-8")
    head = config[: config.index("deepspeed_config:")].replace('mixed_precision: "no"', "")
    (tmp_path / "file.yaml").write_text(
        f"{head}deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'zero3.json'}\n"
    )
    run, done = launch("zero3", "shared", "trainer.max_steps=1", file=tmp_path / "file.yaml")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text())["engine"] == "zero3"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert weights and all(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("engine", FILES)
def test_a_launch_chooses_its_settings(launch, engine):
    """Every process made its plan inside the launched environment, and crashed."""
    run, done = launch(engine, "auto", "trainer.auto=true", "trainer.max_steps=1", "answers=2")
    assert done.returncode == 0, done.stderr
    assert "trainer.auto chose" in done.stderr
    assert "x 2 processes" in done.stderr
    assert (run / "adapter").is_dir()
    # Under ZeRO-2 they were left out without a word, though every process holds whole weights.
    assert (run / "answers.md").is_file() == (engine in ("ddp", "zero2"))
    assert ("no answers and no losses of rows are written" in done.stderr) == (engine in ("fsdp2", "zero3"))


@pytest.fixture
def start_machine(make_recipe, tmp_path):
    """Return a function that starts one of two machines, simulated by two launches on the loopback interface."""
    make_recipe("run")
    port = find_port()
    started = []

    def start(rank, *overrides):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "cpu.yaml"]
        command += ["--num_machines", 2, "--num_processes", 2, "--machine_rank", rank]
        command += [
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            port,
            START,
            "train",
            tmp_path / "recipe.yaml",
        ]
        for override in (f"output={tmp_path / 'run'}", "trainer.per_device_train_batch_size=4", *overrides):
            command += ["-s", override]
        with (tmp_path / f"output{rank}").open("w") as file:
            launched = subprocess.Popen(list(map(str, command)), start_new_session=True, stdout=file, stderr=file)
        started.append(launched)
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_two_machines_train_what_one_process_does(start_machine, make_recipe, tmp_path):
    first, second = start_machine(0), start_machine(1)
    assert (first.wait(600), second.wait(600)) == (0, 0), (tmp_path / "output0").read_text()
    run_training(make_recipe("alone"))
    assert read(tmp_path / "run", "loss") == pytest.approx(read(tmp_path / "alone", "loss"), abs=1e-4)


def test_a_machine_ends_with_a_message_when_the_other_is_gone(start_machine, tmp_path):
    first, second = start_machine(0, "trainer.max_steps=100000"), start_machine(1, "trainer.max_steps=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        assert first.poll() is None and second.poll() is None, (tmp_path / "output0").read_text()
        time.sleep(0.5)
    # The launcher puts each process into a session of its own.
    for process in (*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)):
        process.kill()
    began = time.monotonic()
    assert first.wait(60) != 0
    print(f"\nended after {time.monotonic() - began:.1f} s")
    assert "another process of this launch has ended" in (tmp_path / "output0").read_text()
