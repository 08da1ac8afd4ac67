"""Several processes: the same losses and the same export whichever engine shares the work, and what each refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from finetune.errors import MachineError, RecipeError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.resources import find_demo_data, find_resource_folder
from finetune.models.engine import check_engine, find_engine
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result

CONFIGS = find_resource_folder("recipes") / "accelerate"
FULL = ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.learning_rate=1e-3"]
PAIRS = [
    f"data.train={find_demo_data('pairs.jsonl')}",
    "data.eval=[]",
    "data.held_out=8",
    "data.max_tokens=256",
    "method=dpo",
]
SAVING = ["trainer.save_strategy=steps", "trainer.save_steps=2"]


@pytest.fixture
def launch(make_recipe, tmp_path):
    """Return a function that trains the small recipe in two processes and gives its run directory and what was printed."""

    def run(config, name, *overrides, resume=False):
        make_recipe(name)  # writes recipe and rows
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        command += [
            "-m",
            "finetune",
            "train",
            str(tmp_path / "recipe.yaml"),
            "--json",
            *(["--resume"] if resume else []),
        ]
        for override in (f"output={tmp_path / name}", "trainer.per_device_train_batch_size=4", *overrides):
            command += ["-s", override]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 4  # one object: only the main process prints
        return tmp_path / name, done.stderr

    return run


def export(run, folder):
    report = export_result(open_result(run), folder, ExportSettings("float32", "1GB"), LogitVerifier())
    return report, load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "overrides"),
    [("cpu", []), ("cpu", PAIRS), ("fsdp2", SAVING), ("fsdp2", FULL), ("fsdp2", ["model.quantize=nf4"])],
    ids=["ddp", "ddp-dpo", "fsdp2", "fsdp2-full", "fsdp2-nf4"],
)
def test_two_processes_train_and_export_what_one_does(launch, train, read_losses, tmp_path, config, overrides):
    alone = train("alone", *overrides)
    run, notes = launch(config, "shared", *overrides)
    assert f"x 2 processes, {'FSDP2' if config == 'fsdp2' else 'DDP'})" in notes
    assert notes.count("effective batch size: 8 rows") == 1
    assert read_losses(run) == pytest.approx(read_losses(alone), abs=1e-4)
    kind = "model" if overrides == FULL else "adapter"
    assert {path.name for path in (run / kind).iterdir()} == {path.name for path in (alone / kind).iterdir()}
    (_, expected), (report, found) = export(alone, tmp_path / "one"), export(run, tmp_path / "two")
    assert report.verify.max_abs <= 1e-4
    assert set(found) == set(expected)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 2e-4
    if overrides == SAVING:
        check_resuming(launch, run)


def check_resuming(launch, run):
    """Two processes that hold shares go on from a checkpoint to the very same adapter."""
    straight = load_file(run / "adapter" / "adapter_model.safetensors")
    for folder in ("adapter", "checkpoint-4"):
        for path in (run / folder).iterdir():
            path.unlink()
        (run / folder).rmdir()
    launch("fsdp2", run.name, *SAVING, resume=True)
    resumed = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_what_accelerate_reads(path, monkeypatch):
    """Every key must be one that accelerate knows: it passes over unknown ones of a section in silence."""
    monkeypatch.setattr("accelerate.commands.launch.is_bf16_available", lambda ignore_tpu: True)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    parsed, _, _ = _validate_launch_command(arguments)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in ("fsdp_config", "deepspeed_config"):
        for key, value in content.get(section, {}).items():
            assert hasattr(parsed, key), key
            assert getattr(parsed, key) == value
    assert parsed.num_processes == 2
    assert (parsed.use_fsdp, parsed.use_deepspeed) == ("fsdp" in path.stem, "zero" in path.stem)


def set_environment(monkeypatch, **variables):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "engine"),
    [
        ({}, "one"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "one"),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
    ],
)
def test_engine_is_what_the_launcher_set(monkeypatch, variables, engine):
    set_environment(monkeypatch, **variables)
    assert find_engine() == engine


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_settings_that_cannot_train_are_refused(monkeypatch, variables, message):
    set_environment(monkeypatch, WORLD_SIZE="2", ACCELERATE_USE_FSDP="true", **variables)
    with pytest.raises(MachineError, match=message):
        find_engine()


@pytest.mark.parametrize(
    ("engine", "override", "key"),
    [
        ("fsdp2", "adapter.train_tokens=[104]", "adapter.train_tokens"),
        ("zero3", "adapter.train_tokens=[104]", "adapter.train_tokens"),
        ("fsdp2", "model.quantize=int8", "model.quantize"),
        ("fsdp2", "trainer.optim=paged_adamw_8bit", "trainer.optim"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_key(make_recipe, engine, override, key):
    recipe = make_recipe("run", override)
    check_engine(recipe, "ddp")
    with pytest.raises(RecipeError, match=key):
        check_engine(recipe, engine)
