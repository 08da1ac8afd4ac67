"""What one of several processes holds: shares by formula, and as torch really cuts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.cli.main import main
from finetune.errors import MachineError, RecipeError
from finetune.files.resources import find_resource_folder
from finetune.planning.forecast import choose_target, make_plan
from finetune.planning.step import tracker as phase
from finetune.planning.step.sharing import BUCKETS, COPIES, GATHERED, Sharing, read_sharing
from finetune.planning.step.step_memory import measure_step
from finetune.planning.step.step_parts import ADAPTER, GRADIENTS, OPTIMIZER, SMALL, TABLES

CONFIGS = find_resource_folder("recipes") / "accelerate"
FULL = ("sft_full", "data.max_tokens=128", "trainer.optim=adamw_torch", "trainer.gradient_accumulation_steps=1")
LORA = ("sft_lora", "data.max_tokens=128", "adapter.train_tokens=[]")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_parts_sum_to_the_peak_under_every_engine(make_recipe, engine):
    recipe = make_recipe(*LORA)
    plan = make_plan(recipe, choose_target(recipe, None, None, engine, 3))
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert (plan.engine, plan.processes) == (engine, 3)
    assert plan.step.tokens == 3 * 128 * recipe.recipe.trainer["gradient_accumulation_steps"]


def count_rows(shapes, processes):
    return sum(-(-rows // processes) * rest for rows, rest in shapes)


def test_fsdp2_keeps_whole_rows_of_everything(make_recipe):
    """Full training in float32 on nano: weights, gradients and both moments, cut by rows."""
    step = measure_step(make_recipe(*FULL, "model.dtype=float32"), is_gpu=False, engine="fsdp2", processes=3)
    layer = [(320, 320), (64, 320), (64, 320), (320, 320), (800, 320), (800, 320), (320, 800)]
    small = [(320, 1), (64, 1), (64, 1), (320, 1), (320, 1), (320, 1)]  # four biases, two norms
    tables = [(1312, 320), (1312, 320)]
    parts = step.peak.parts
    assert parts["weights: linear layers, fp32"] == 4 * 4 * count_rows(layer, 3)
    assert parts[TABLES] == 4 * count_rows(tables, 3)
    assert parts[SMALL] >= 4 * (4 * count_rows(small, 3) + count_rows([(320, 1)], 3))
    elements = 4 * count_rows(layer + small, 3) + count_rows(tables, 3) + count_rows([(320, 1)], 3)
    tensors = 4 * (7 + 6) + 3
    assert parts[OPTIMIZER] == 2 * 4 * elements + 4 * tensors  # two moments, and a counter for each


def test_ddp_holds_the_gradients_twice(make_recipe):
    alone = measure_step(make_recipe(*LORA), is_gpu=False)
    shared = measure_step(make_recipe(*LORA), is_gpu=False, engine="ddp", processes=2)
    assert shared.peak.parts[BUCKETS] == 4 * shared.trainable
    assert shared.peak.bytes == alone.peak.bytes + 4 * shared.trainable
    assert BUCKETS not in alone.peak.parts


def test_zero_shares_follow_the_paper(make_recipe):
    """In 16 bits: (2 + K) n / N bytes for gradients and optimizer, K = 12, where stage 2 keeps 2 n of weights whole."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1000, 999, bias=False)])})
    weight = model["layers"][0].weight
    two, three = Sharing("zero2", 4), Sharing("zero3", 4)
    quarter = 999 * 1000 // 4
    assert two.count_share(weight, "weights: linear layers, fp32") == 2 * 999 * 1000
    assert three.count_share(weight, "weights: linear layers, fp32") == 2 * quarter
    assert two.count_share(weight, GRADIENTS) == 2 * quarter
    assert two.count_share(weight, OPTIMIZER) == 4 * quarter
    named = torch.nn.Module()
    named.model = model
    named.embed_tokens = torch.nn.Embedding(10, 4).requires_grad_(False)
    extras = two.list_extras(named)
    assert extras[phase.STEP] == {COPIES: 4 * quarter}
    assert extras[phase.BACKWARD][BUCKETS] == 2 * 500_000_000
    assert three.list_extras(named)[phase.FORWARD][GATHERED] == 2 * (999 * 1000 + 40)
    small = torch.nn.Parameter(torch.zeros(100, 100))
    assert three.count_share(small, ADAPTER) == 2 * small.numel()  # below DeepSpeed's threshold


CUT = """
import os, sys
import torch
import torch.multiprocessing as processes
from torch.distributed.fsdp import fully_shard
from finetune.planning.step.sharing import Sharing

def cut(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5))
    expected = [Sharing("fsdp2", 2).count_share(p.data, "weights: linear layers, fp32") for p in model.parameters()]
    fully_shard(model)
    found = [p.to_local().untyped_storage().nbytes() for p in model.parameters()]
    if rank == 0:
        print(expected == found, found)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    processes.spawn(cut, nprocs=2)
"""


def test_fsdp2_cuts_as_planned(tmp_path):
    (tmp_path / "cut.py").write_text(CUT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "cut.py"), "29641"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True"), done.stdout


@pytest.mark.parametrize(
    ("name", "engine"), [("cpu", "ddp"), ("ddp", "ddp"), ("fsdp2", "fsdp2"), ("zero2", "zero2"), ("zero3", "zero3")]
)
def test_engine_is_read_from_accelerates_file(name, engine):
    assert read_sharing(CONFIGS / f"{name}.yaml") == (engine, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP 1 is not supported"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}",
            "zero_stage in accelerate's configuration is 1; set 2 or 3",
        ),
        ("distributed_type: TPU", "TPU is unknown"),
        ("- a list", "must be a mapping of keys to values"),
        ("a: [", "cannot be read"),
        (
            "distributed_type: MULTI_CPU\nnum_processes: many",
            "num_processes: must be a whole number of at least 1; found 'many'",
        ),
    ],
)
def test_files_that_no_plan_can_be_made_for(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(MachineError, match=message):
        read_sharing(tmp_path / "config.yaml")


def test_an_unknown_configuration_is_refused_with_the_known_names(tmp_path):
    """The message was the system's own about a missing file, and a pipe was waited on for ever."""
    with pytest.raises(MachineError, match=r"there is no file nosuch, .*known are cpu, ddp, fsdp2, zero2, zero3"):
        read_sharing(Path("nosuch"))
    with pytest.raises(MachineError, match="did you mean 'fsdp2'"):
        read_sharing(Path("fsdp"))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(MachineError, match="there is no file"):
        read_sharing(tmp_path / "pipe.yaml")


def test_plan_takes_accelerates_file(capsys):
    command = ["plan", "sft_lora", "-s", "model.checkpoint=nano", "-s", "adapter.train_tokens=[]", "--json"]
    with pytest.raises(SystemExit):
        main([*command, "--accelerate", str(CONFIGS / "fsdp2.yaml"), "--processes", "4"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["engine"], plan["processes"]) == ("fsdp2", 4)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--engine", "zero3"])
    assert stop.value.code == 2 and "--processes 2" in capsys.readouterr().err


def test_plan_refuses_what_an_engine_cannot_share(make_recipe):
    recipe = make_recipe("sft_lora")
    with pytest.raises(RecipeError, match=r"adapter\.train_tokens"):
        make_plan(recipe, choose_target(recipe, None, None, "fsdp2", 2))
