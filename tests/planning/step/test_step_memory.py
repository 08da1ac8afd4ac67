"""The forecast of a training step against real runs under the same tracker, and against formulas."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.checkpoints.finding import find_base_folder
from finetune.compat import load_operations
from finetune.models.loading import load_base
from finetune.models.precision import Precision, choose_planned_precision
from finetune.planning.forecast import Target, describe_plan, make_plan
from finetune.planning.hardware import CUBLAS_BYTES
from finetune.planning.step.kernels import GPU_WORKSPACES, REPEATABLE_WORKSPACES
from finetune.planning.step.step_memory import measure_step
from finetune.planning.step.step_parts import (
    ADAPTER,
    GRADIENTS,
    KEPT,
    OPTIMIZER,
    RECOMPUTED,
    SCALES,
    SMALL,
    TABLES,
    WORKSPACE,
    list_weights,
    may_use_flash,
)
from finetune.yulan.layout import PUBLISHED_SIZES
from tests.planning.conftest import measure_run

SHORT = "data.max_tokens=256"
LORA = ("sft_lora", SHORT, "adapter.train_tokens=[]")
ADAMW = "trainer.optim=adamw_torch"
CASES = {
    "lora": (*LORA, "trainer.gradient_accumulation_steps=1"),
    "lora-accumulated": (*LORA, "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=2"),
    "lora-keeps-activations": (*LORA, "trainer.gradient_accumulation_steps=1", "trainer.gradient_checkpointing=false"),
    "lora-every-third": (
        *LORA,
        "trainer.gradient_accumulation_steps=1",
        "trainer.gradient_checkpointing_kwargs={every_n_layers: 3}",
    ),
    "lora-trains-tokens": ("sft_lora", SHORT, "trainer.gradient_accumulation_steps=2"),
    "nf4": ("sft_qlora", SHORT, "adapter.train_tokens=[]", "trainer.gradient_accumulation_steps=2"),
    "nf4-keeps-activations": ("demo", "trainer.per_device_train_batch_size=2"),
    "full": ("sft_full", SHORT, ADAMW, "model.dtype=auto", "trainer.gradient_accumulation_steps=1"),
    "full-bf16": ("sft_full", SHORT, ADAMW, "trainer.gradient_accumulation_steps=2"),
    "int8": (*LORA, "model.quantize=int8", "trainer.gradient_accumulation_steps=1"),
    "whole-modules": (
        *LORA,
        "adapter.modules_to_save=[embed_tokens, lm_head, norm]",
        "trainer.gradient_accumulation_steps=2",
    ),
    "dpo": ("dpo_lora", SHORT, "trainer.gradient_accumulation_steps=1"),
    "nf4-streamed": ("sft_qlora", SHORT, "model.stream_layers=true", "trainer.gradient_accumulation_steps=2"),
    "packed": (*LORA, "trainer.gradient_accumulation_steps=1", "trainer.packing=true"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["nano", "larger"])
def test_prediction_matches_a_real_run(make_recipe, larger_start, case, size):
    name, *overrides = CASES[case]
    if size == "larger":
        overrides.append(f"model.checkpoint={larger_start}")
    recipe = make_recipe(name, *overrides)
    assert_equal_memory(measure_step(recipe, is_gpu=False), measure_run(recipe))


def assert_equal_memory(predicted, measured):
    """Compare peaks to a thousandth, and their parts."""
    assert predicted.peak.bytes == pytest.approx(measured.peak.bytes, rel=0.001)
    assert predicted.loss_bytes == pytest.approx(measured.loss_bytes, rel=0.001)
    for plan in (predicted.peak, measured.peak):
        assert sum(plan.parts.values()) == plan.bytes
    for part in {*predicted.peak.parts, *measured.peak.parts} - {"workspace"}:
        expected = pytest.approx(measured.peak.parts.get(part, 0), rel=0.01, abs=measured.peak.bytes / 1000)
        assert predicted.peak.parts.get(part, 0) == expected, part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["anneal_nano", "pretrain"])
def test_prediction_of_pretraining_matches_a_real_run(make_recipe, recipe, dtype):
    """The table of the native form, which is the head too, was counted twice, with its gradient and its moments."""
    overrides = [f"model.dtype={dtype}", "trainer.per_device_train_batch_size=3", "data.max_tokens=512"]
    if recipe == "pretrain":
        overrides += ["trainer.gradient_accumulation_steps=2", "trainer.gradient_checkpointing=true"]
    prepared = make_recipe(recipe, *overrides)
    assert_equal_memory(measure_step(prepared, is_gpu=False), measure_run(prepared))


@pytest.mark.parametrize(("moments", "bytes_each"), [("float32", 12), ("cpu", 0), ("8bit", 6)])
def test_copies_and_moments_of_pretraining_match_a_formula(make_recipe, moments, bytes_each):
    """Float32 copies take 4 bytes a weight, moments 8, or 2 where they are in 8 bits; on the processor they take none."""
    plan = measure_step(make_recipe("anneal_nano", f"optimizer.moments={moments}"), is_gpu=True)
    found = plan.peak.parts.get(OPTIMIZER, 0)
    assert found == pytest.approx(bytes_each * plan.trainable, rel=0.03)


def test_parts_tell_kept_from_recomputed(make_recipe):
    kept = measure_step(make_recipe(*CASES["lora-keeps-activations"]), is_gpu=False)
    again = measure_step(make_recipe(*CASES["lora"]), is_gpu=False)
    assert kept.peak.parts[KEPT] > 5 * again.peak.parts[KEPT]
    assert RECOMPUTED not in kept.peak.parts


@pytest.mark.parametrize("size", ["nano", "larger"])
def test_nf4_layout_is_that_of_quantized_weights(make_recipe, larger_start, size):
    start = "nano" if size == "nano" else str(larger_start)
    recipe = make_recipe("sft_qlora", SHORT, "adapter.train_tokens=[]", f"model.checkpoint={start}")
    predicted = measure_step(recipe, is_gpu=False).peak.parts
    real = load_base(
        find_base_folder(start, "llama"), recipe.recipe.model, Precision(torch.float32, "no"), torch.device("cpu")
    )
    storages, sizes = set(), {}
    for part, tensor in list_weights(real):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            sizes[part] = sizes.get(part, 0) + storage.nbytes()
    for part in ("weights: linear layers, nf4", SCALES, TABLES, SMALL):
        assert predicted[part] == sizes[part], part


def test_flash_attn_is_planned_on_a_machine_without_it(make_recipe):
    """The plan asked transformers for the package, and ended with an ImportError.

    So that a resumed run is the same run, the kernel keeps the gradients of queries in several parts: as many as give each
    multiprocessor of the card a part of a head.
    """
    recipe = make_recipe(*CASES["lora-keeps-activations"], "model.attention=flash_attention_2")
    assert may_use_flash(recipe) and not may_use_flash(make_recipe(*LORA))
    heads, width, parts = 5, 64, 34  # 170 / 5
    extra = (parts - 1) * 256 * heads * width * 4
    assert measure_step(recipe, is_gpu=True).peak.parts[WORKSPACE] > extra
    arguments = [None, torch.empty(1, heads, 250, width), torch.empty(1, heads, 250, width)]
    operation = load_operations().attention_backward
    plain, repeatable = (table[operation](arguments, None) for table in (GPU_WORKSPACES, REPEATABLE_WORKSPACES))
    assert repeatable - plain == extra


def test_whole_modules_match_a_formula(make_recipe):
    """A copy in float32, its gradient and two moments: 16 bytes a weight, beside the bfloat16 table of the base."""
    settings = ("sft_qlora", "model.checkpoint=nano", SHORT, "adapter.train_tokens=[]")
    without, whole = (
        measure_step(make_recipe(*settings, setting), is_gpu=True)
        for setting in ("adapter.modules_to_save=[]", "adapter.modules_to_save=[lm_head, norm]")
    )
    trained = 320 * (1312 + 1)
    assert whole.trainable - without.trainable == trained
    grown = {
        part: whole.peak.parts[part] - without.peak.parts[part] for part in (ADAPTER, GRADIENTS, OPTIMIZER, TABLES)
    }
    assert grown == {ADAPTER: 4 * trained, GRADIENTS: 4 * trained, OPTIMIZER: 8 * trained + 8, TABLES: 0}


def test_full_model_matches_formulas(make_recipe):
    recipe = make_recipe("sft_qlora", "model.checkpoint=base", "data.max_tokens=4096", "adapter.train_tokens=[]")
    step = measure_step(recipe, is_gpu=True)
    size = PUBLISHED_SIZES
    hidden, inner, rank = size["hidden_size"], size["intermediate_size"], recipe.recipe.adapter.rank
    keys = size["num_key_value_heads"] * size["head_dim"]
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), *[(inner, hidden)] * 3]
    layers = size["num_hidden_layers"]
    adapter = layers * sum(rank * (rows + columns) for rows, columns in shapes)
    weights = layers * sum(rows * columns for rows, columns in shapes)
    matrices = 2 * layers * len(shapes)
    parts = step.peak.parts
    assert step.trainable == adapter
    assert parts[ADAPTER] == parts[GRADIENTS] == 4 * adapter
    assert parts[OPTIMIZER] == 8 * adapter + 4 * matrices  # two moments, and a counter for each matrix
    assert parts["weights: linear layers, nf4"] == weights // 2
    assert parts[TABLES] == 2 * 2 * size["vocab_size"] * hidden
    blocks = [rows * columns // 64 for rows, columns in shapes]
    # Block scales in 8 bits, theirs in 32, their mean, and the tables of both codes, for each matrix.
    assert parts[SCALES] == layers * sum(count + 4 * -(-count // 256) + 4 + 4 * 16 + 4 * 256 for count in blocks)
    # The goal for a card of 6 GB, and the loss beside the logits that it does not make.
    assert step.peak.bytes < 4 * 2**30
    assert step.loss_bytes <= 0.1 * 4096 * size["vocab_size"] * 4


def test_longest_rows_meet_the_goals_within_time_and_memory(make_recipe):
    """28,672 tokens: what an H100 allocated (benchmarks/gpu.md); for a card of 6 GB activations are offloaded and layers streamed.

    The plan was 8 % too high while PEFT's layers copied their inputs to float32 in the dry run, which they do not on a GPU.
    """
    long = ("sft_qlora", "model.checkpoint=base", "data.max_tokens=28672")
    plain = measure_step(make_recipe(*long), is_gpu=True)
    small = ("trainer.activation_offloading=true", "model.stream_layers=true")
    offloaded = measure_step(make_recipe(*long, *small), is_gpu=True)
    kept = 56 * 28672 * 1920 * 2  # one tensor a layer
    assert kept < plain.peak.parts[KEPT] < 1.01 * kept
    assert offloaded.peak.parts[KEPT] < 0.03 * kept
    assert plain.peak.bytes + CUBLAS_BYTES == pytest.approx(11_277_694_464, rel=0.01)
    assert offloaded.main_memory["offloaded activations"] == pytest.approx(kept, rel=0.2)
    # The CUDA context takes 0.5 GiB, and the allocator 5 % more.
    assert offloaded.peak.bytes < 5 * 2**30


def test_streamed_layers_match_formulas_and_their_goals(make_recipe):
    """Two of 56 layers stay on the GPU, and 2,048 tokens fit 4 GB."""
    size, streams = PUBLISHED_SIZES, ("sft_qlora", "model.checkpoint=base", "model.stream_layers=true")
    hidden, keys = size["hidden_size"], size["num_key_value_heads"] * size["head_dim"]
    layer = (2 * hidden * hidden + 2 * keys * hidden + 3 * size["intermediate_size"] * hidden) // 2
    plan = make_plan(make_recipe(*streams), Target(True, 4 * 2**30))
    assert plan.fits
    assert plan.parts["weights: linear layers, nf4"] == 2 * layer
    assert plan.main_memory == {"streamed layers": 56 * layer}
    assert plan.step.streamed_bytes == 16 * 2 * 54 * layer
    assert "copying 32 GB of streamed layers a step is not included" in describe_plan(plan)
    assert "main memory beside it: 1.02 GB for streamed layers" in describe_plan(plan)


def test_what_is_streamed_counts_once_it_is_loaded(make_recipe):
    """A short step of an adapter of rank 1 needs less than loading the base; one that is not quantized never is on the GPU."""
    short = ("data.max_tokens=8", "adapter.train_tokens=[]", "adapter.rank=1", "model.stream_layers=true")
    quantized = measure_step(make_recipe("sft_lora", "model.quantize=int8", *short), is_gpu=True).peak
    plain = measure_step(make_recipe("sft_lora", *short), is_gpu=True).peak
    assert quantized.phase == "loading"
    assert GRADIENTS not in quantized.parts
    assert plain.phase != "loading"


def test_paged_optimizer_leaves_the_device(make_recipe):
    full = ("sft_full", SHORT, "trainer.gradient_accumulation_steps=1")
    paged = measure_step(make_recipe(*full, "trainer.optim=paged_adamw_8bit"), is_gpu=True)
    in_place = measure_step(make_recipe(*full, "trainer.optim=adamw_8bit"), is_gpu=True)
    plain = measure_step(make_recipe(*full, ADAMW), is_gpu=True)
    held = [step.peak.parts.get(OPTIMIZER, 0) for step in (paged, in_place, plain)]
    assert held[0] < 0.2 * held[1]
    assert held[1] < held[2]


RESIDENT = """
import sys
from pathlib import Path
from finetune.check.recipes import load_recipe
from tests.planning.conftest import build_real_trainer
trainer = build_real_trainer(load_recipe(Path(sys.argv[1]), sys.argv[2:]))
read = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before = read("VmRSS")
trainer.train()
print(read("VmHWM") - before)
"""
ROOT = Path(__file__).parents[3]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory as Linux counts it")


@needs_linux
def test_resident_memory_grows_as_predicted(make_recipe, larger_start, tmp_path):
    overrides = [
        f"model.checkpoint={larger_start}",
        f"output={tmp_path}",
        "data.max_tokens=2048",
        "adapter.train_tokens=[]",
        "trainer.gradient_accumulation_steps=1",
        "trainer.gradient_checkpointing=false",
    ]
    peak = measure_step(make_recipe("sft_lora", *overrides), is_gpu=False).peak
    there_before = sum(size for part, size in peak.parts.items() if part.startswith(("weights", ADAPTER)))
    # Otherwise the C library keeps what was freed, and tensors of many sizes leave gaps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", RESIDENT, "sft_lora", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert int(done.stdout) == pytest.approx(peak.bytes - there_before, rel=0.15)


@needs_linux
def test_planning_the_full_model_stays_small():
    """The plan of the longest rows keeps less than 1 GB resident, in a process of its own."""
    code = (
        "from finetune.cli.main import main\n"
        "try: main(['plan', 'sft_qlora', '-s', 'data.max_tokens=28672', '--json'])\n"
        "finally: open('/dev/stderr', 'w').write(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    highest = next(line for line in done.stderr.splitlines() if line.startswith("VmHWM"))
    assert int(highest.split()[1]) * 1024 < 10**9


def test_annealing_at_the_longest_context_fits_one_card(make_recipe):
    """The native loss, with the float32 sums of the head's gradient, takes a tenth of the naive logits at most."""
    step = measure_step(make_recipe("anneal", "model.checkpoint=before-annealing"), is_gpu=True)
    assert step.loss_bytes <= 0.1 * 28672 * PUBLISHED_SIZES["vocab_size"] * 4
    assert step.peak.bytes < 60 * 2**30


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("dtype", "weights"), [("auto", torch.float32), ("bfloat16", torch.float32), ("float32", torch.float32)]
)
def test_processes_that_pretrain_are_planned_with_float32_weights(make_recipe, engine, dtype, weights):
    """Those of bfloat16 were planned with half of what a run holds."""
    recipe = make_recipe("anneal_nano", f"model.dtype={dtype}")
    assert choose_planned_precision(recipe, True, True, engine).weights == weights
    assert choose_planned_precision(recipe, True, True).weights == (
        torch.float32 if dtype == "float32" else torch.bfloat16
    )
