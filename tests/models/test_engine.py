"""Several processes: the same losses and the same export whichever engine shares the work, and what each refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from finetune.errors import MachineError, RecipeError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.launcher import hide_launcher
from finetune.files.resources import find_demo_data, find_resource_folder
from finetune.models.engine import check_engine, find_engine
from finetune.planning.apart import _plan, plan_apart
from finetune.planning.forecast import Target, check_fits, make_plan
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
    """Two processes that hold shares go on from a checkpoint to the very same adapter, also after the run was moved."""
    straight = load_file(run / "adapter" / "adapter_model.safetensors")
    for folder in ("adapter", "checkpoint-4"):
        for path in (run / folder).iterdir():
            path.unlink()
        (run / folder).rmdir()
    run = run.rename(run.with_name("moved"))
    launch("fsdp2", run.name, *SAVING, resume=True)
    assert f"output: {run}" in (run / "recipe.yaml").read_text(encoding="utf-8")
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
        ({"WORLD_SIZE": ""}, "one"),
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
        ("fsdp2", "adapter.modules_to_save=[norm]", "adapter.modules_to_save"),
        ("fsdp2", "model.quantize=int8", "model.quantize"),
        ("fsdp2", "trainer.optim=paged_adamw_8bit", "trainer.optim"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_key(make_recipe, engine, override, key):
    recipe = make_recipe("run", override)
    check_engine(recipe, "ddp")
    with pytest.raises(RecipeError, match=key):
        check_engine(recipe, engine)


DEEPSPEED_FILE = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "gradient_accumulation_steps": "auto",
}


@pytest.fixture
def use_file(monkeypatch, tmp_path):
    """Return a function that writes a file of DeepSpeed's and names it as accelerate's launcher does."""

    def use(content):
        (tmp_path / "zero.json").write_text(json.dumps(content))
        file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
        set_environment(monkeypatch, WORLD_SIZE="2", ACCELERATE_USE_DEEPSPEED="true", **file)

    return use


def test_the_file_of_deepspeed_decides_the_stage(use_file, make_recipe):
    """ZeRO-3 from a file was taken for ZeRO-2, and the run ended with status 0 and empty tensors."""
    use_file(DEEPSPEED_FILE)
    assert find_engine() == "zero3"
    check_engine(make_recipe("run"), "zero3")
    use_file({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"})
    assert find_engine() == "zero2"
    use_file({"zero_optimization": {"stage": 1}})
    with pytest.raises(MachineError, match=r"zero_optimization.stage in .*zero.json is 1; set 2 or 3"):
        find_engine()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "train_micro_batch_size_per_gpu",
            4,
            'trainer.per_device_train_batch_size in the recipe decides; set "auto"; found 4',
        ),
        ("bf16", {"enabled": True}, "bf16.enabled in DeepSpeed's file: model.dtype in the recipe decides"),
        (
            "optimizer",
            {"type": "AdamW"},
            "optimizer in DeepSpeed's file: trainer.optim in the recipe decides; remove it",
        ),
        ("gradient_accumulation_steps", None, "gradient_accumulation_steps in DeepSpeed's file: is missing"),
        (
            "zero_optimization",
            {"stage": 3},
            "stage3_gather_16bit_weights_on_model_save in DeepSpeed's file: must be true",
        ),
    ],
)
def test_a_file_of_deepspeed_that_contradicts_the_recipe_is_refused(use_file, make_recipe, key, value, message):
    use_file({**DEEPSPEED_FILE, key: value})
    with pytest.raises(RecipeError) as caught:
        check_engine(make_recipe("run"), "zero3")
    assert message in str(caught.value)


def test_a_plan_inside_a_launch_is_the_plan_outside(make_recipe, monkeypatch, unguarded_script):
    """`accelerate launch` on GPUs crashed in it: accelerate wrapped the model without content for DDP.

    A person's script that has no `if __name__ == "__main__"` ran a second time there, and trained alone.
    """
    recipe, target = make_recipe("run"), Target(True, 80 << 30, None, "ddp", 2)
    expected = make_plan(recipe, target)
    set_environment(monkeypatch, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert plan_apart(make_plan, recipe, target) == expected
    assert os.environ["RANK"] == "1"
    assert not unguarded_script.exists()
    with hide_launcher():
        assert _plan(check_fits, recipe, replace(target, memory_bytes=1000))[1].startswith("does not fit: ")
