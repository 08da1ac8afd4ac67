"""What only a GPU shows, with nano: losses as on the processor, resuming, memory that runs out, exports and answers."""

import gc
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.check.recipes import load_recipe
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter
from finetune.models.opening import open_model
from finetune.models.precision import Precision
from finetune.models.streaming.from_main_memory import stream_layers
from finetune.pipeline import memory_ladder
from finetune.pipeline.memory_ladder import train_on_device
from finetune.planning.forecast import Target, make_plan
from finetune.planning.hardware import CONTEXT_BYTES
from finetune.recipe.sections import AdapterSection, ModelSection
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training
from finetune.training.speed import compiled_layers, speed_trial
from finetune.training.speed.ways import WAYS
from finetune.yulan.folding import fold_checkpoint

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HAS_GPU and "GPU_TEST_REHEARSAL" not in os.environ, reason="needs an NVIDIA GPU")
only_on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU, also in a rehearsal")

# bfloat16 keeps 8 bits: a loss of 4 rounded at every layer moves by about a hundredth. 4-bit and 8-bit kernels round as well.
ROUNDING = 0.03
ALL = ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.learning_rate=1e-4"]
KINDS = {
    "bf16": ["model.dtype=bfloat16"],
    "fp16": ["model.dtype=float16"],
    "nf4": ["model.quantize=nf4"],
    "int8": ["model.quantize=int8"],
    "all weights": ALL,
    "all weights, 8-bit paged": [*ALL, "trainer.optim=paged_adamw_8bit"],
    "native": ["model.architecture=native"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_the_processor(train, read_losses, kind):
    processor = [setting for setting in KINDS[kind] if not setting.startswith(("model.dtype", "model.quantize=int8"))]
    processor = [setting for setting in processor if "paged" not in setting]
    expected = read_losses(train("processor", *processor, "trainer.use_cpu=true"))
    assert read_losses(train("gpu", *KINDS[kind])) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "simpo"])
def test_preference_losses_equal_those_of_the_processor(make_pairs_recipe, read_losses, method):
    def run(name, *overrides):
        recipe = make_pairs_recipe(name, method, "trainer.learning_rate=1e-4", *overrides)
        return read_losses(Path(run_training(recipe).run))

    assert run("gpu", "model.dtype=float32") == pytest.approx(run("processor", "trainer.use_cpu=true"), rel=ROUNDING)


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8", "all weights, 8-bit paged", "native"])
def test_a_resumed_run_is_the_same_run(train, kind):
    saving = [*KINDS[kind], "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=4"]
    straight, resumed = train("straight", *saving), train("resumed", *saving)
    # As if it had been killed between step 2 and the end.
    for name in ("adapter", "model", "checkpoint-4"):
        shutil.rmtree(resumed / name, ignore_errors=True)
    train("resumed", *saving, resume=True)
    files = [*straight.glob("adapter/*.safetensors"), *straight.glob("model/*.safetensors")]
    assert files
    # How far they are apart, should they not be equal to the bit.
    apart = {}
    for file in files:
        first, second = load_file(file), load_file(resumed / file.relative_to(straight))
        apart |= {name: float((first[name] - second[name]).abs().max()) for name in first}
    assert not any(apart.values()), f"weights differ by up to {max(apart.values()):.3g} after resuming"


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8", "all weights"])
def test_an_export_equals_what_was_trained(train, tmp_path, kind):
    run = train("run", *KINDS[kind])
    settings = ExportSettings("auto", "2GB", "full")
    report = export_result(open_result(run), tmp_path / "export", settings, LogitVerifier())
    assert report.verify.top1_agreement > 0.95
    model = open_model(str(tmp_path / "export"))
    assert model.model.device.type == ("cuda" if HAS_GPU else "cpu")
    assert 0 < model.answer("What is 2 + 2?", max_new_tokens=16).tokens <= 16


def test_fold_needs_no_gpu(nano, tmp_path):
    before = torch.cuda.memory_allocated()
    fold_checkpoint(nano, tmp_path / "fold", "auto", 2 * 10**9)
    assert torch.cuda.memory_allocated() == before


def test_one_step_of_an_online_method(make_recipe, read_losses):
    overrides = [
        "method=grpo",
        "rewards.rules={one_sentence: 1.0}",
        "trainer.max_steps=1",
        "trainer.num_generations=4",
        "trainer.max_completion_length=16",
        "trainer.beta=0.01",
    ]
    assert len(read_losses(Path(run_training(make_recipe("grpo", *overrides)).run))) == 1


@only_on_gpu
def test_memory_that_runs_out_makes_the_micro_batch_smaller(make_recipe, read_losses, caplog):
    """The effective batch size stays, so the losses are those of a run that had enough memory."""
    wide = ["trainer.per_device_train_batch_size=32", "trainer.gradient_accumulation_steps=1", "trainer.auto=true"]
    fixed = [*wide, "trainer.gradient_checkpointing=false", "trainer.max_steps=2"]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = read_losses(Path(train_on_device(make_recipe("enough", *fixed)).run))
    peak = torch.cuda.max_memory_reserved()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    try:
        run = Path(train_on_device(make_recipe("short", *fixed)).run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in caplog.text
    assert read_losses(run) == pytest.approx(expected, rel=ROUNDING)


OPEN_RECIPE = """
model: {checkpoint: nano}
data: {train: rows.jsonl, eval: held.jsonl, max_tokens: 128}
adapter: {rank: 4, alpha: 8}
answers: 0
row_losses: 0
trainer: {auto: true, global_batch: 32, max_steps: 2, learning_rate: 2e-3, logging_steps: 1, save_strategy: "no", disable_tqdm: true}
"""


def test_automatic_settings_need_no_more_memory_than_there_is(make_recipe, read_losses, caplog, monkeypatch, tmp_path):
    """The run may take no more than the card that it was planned for has, and never finds its memory too small."""
    common = ["trainer.max_steps=2", "trainer.gradient_accumulation_steps=1"]
    whole = ["trainer.per_device_train_batch_size=32", "trainer.gradient_checkpointing=false"]
    least = ["trainer.per_device_train_batch_size=1", "trainer.gradient_checkpointing=true"]
    highest, lowest = (make_plan(make_recipe("planned", *common, *how), Target(HAS_GPU)) for how in (whole, least))
    (tmp_path / "open.yaml").write_text(OPEN_RECIPE)
    left_open = load_recipe(tmp_path / "open.yaml", [f"output={tmp_path / 'automatic'}"])
    memory = (highest.peak_bytes + lowest.peak_bytes) // 2
    monkeypatch.setattr(memory_ladder, "find_target", lambda device: Target(HAS_GPU, memory))
    expected = read_losses(Path(run_training(make_recipe("whole", *common, *whole)).run))
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((memory - CONTEXT_BYTES) / total)
    try:
        run = Path(train_on_device(left_open).run)
    finally:
        if HAS_GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" not in caplog.text
    assert 1 <= load_recipe(run / "recipe.yaml", []).recipe.trainer["per_device_train_batch_size"] < 32
    assert read_losses(run) == pytest.approx(expected, rel=ROUNDING)


STREAMED_KINDS = {"nf4": ["model.quantize=nf4"], "int8": ["model.quantize=int8"], "bf16": ["model.dtype=bfloat16"]}


@pytest.mark.parametrize("kind", STREAMED_KINDS)
def test_streamed_layers_give_the_same_bits(train, read_losses, deep_base, kind):
    steps = [
        f"model.checkpoint={deep_base}",
        "trainer.gradient_checkpointing=true",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
        "answers=4",
    ]
    whole = train("whole", *STREAMED_KINDS[kind], *steps)
    streamed = train("streamed", *STREAMED_KINDS[kind], *steps, "model.stream_layers=true")
    assert read_losses(streamed) == read_losses(whole)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, streamed))
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert (streamed / "answers.md").read_text() == (whole / "answers.md").read_text()


@pytest.fixture
def deep_model(tmp_path):
    """Return a function that loads a model of 24 layers of 13 MB in 4 bits, with an adapter; copying takes as long as computing."""
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, vocab_size=512, **sizes)).to(torch.bfloat16).save_pretrained(
            tmp_path / "deep"
        )

    def load():
        section = ModelSection(quantize="nf4")
        base = load_base(tmp_path / "deep", section, Precision(torch.bfloat16, "bf16"), torch.device("cuda", 0))
        torch.manual_seed(1)
        return attach_adapter(base, AdapterSection(rank=8, alpha=16), tmp_path / "deep")

    return load


def train_deep(model, steps=4):
    """Return the losses of some steps on 512 tokens, the adapter, and the peak of the memory during all but the first step."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), 1e-3)
    tokens, losses = torch.arange(512, device="cuda").unsqueeze(0), []
    for step in range(steps):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = [weight.detach().cpu() for weight in model.parameters() if weight.requires_grad]
    return losses, weights, torch.cuda.max_memory_allocated()


@only_on_gpu
def test_a_deep_model_is_streamed_with_the_same_bits_in_less_memory(deep_model):
    """The copies of this model do not wait for the processor, so a missing event would show other bits."""
    gc.collect()
    torch.cuda.empty_cache()
    model = deep_model()
    losses, weights, peak = train_deep(model)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    model = deep_model()
    stream = stream_layers(model, torch.device("cuda", 0))
    streamed_losses, streamed_weights, streamed_peak = train_deep(model)
    assert streamed_losses == losses
    assert all(map(torch.equal, streamed_weights, weights))
    assert stream.host.is_pinned()
    assert peak - streamed_peak > 0.8 * stream.host.nbytes


@pytest.fixture
def let_win(monkeypatch):
    """Return a function that lets one way of `model.speed` count as faster and leaves the others out.

    The test is skipped where the package of the way is missing.
    """

    def win(name):
        if (missing := WAYS[name].find_missing(torch.device("cuda" if HAS_GPU else "cpu"))) is not None:
            pytest.skip(missing)
        for other, way in WAYS.items():
            changed = {"faster": math.inf} if other == name else {"find_missing": lambda device: "left out"}
            monkeypatch.setitem(WAYS, other, replace(way, **changed))
        if not HAS_GPU:  # a rehearsal: the compiler itself takes most of a minute
            monkeypatch.setattr(compiled_layers, "COMPILER", {"backend": "aot_eager", "dynamic": True})
        monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", 0 if WAYS[name].needs_long_run else math.inf)
        # Its gradients are otherwise added in any order where rows are long.
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")

    return win


@pytest.mark.parametrize("way", ["compiled layers", "fused kernels", "flash attention"])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_a_faster_way_trains_the_same_run_and_resumes_it(train, read_losses, let_win, kind, way):
    """They round in another order, so losses agree within rounding; a resumed run has the same kernels, and so the same bits."""
    let_win(way)
    saving = [
        *KINDS[kind],
        "trainer.save_strategy=steps",
        "trainer.save_steps=2",
        "trainer.gradient_checkpointing=true",
    ]
    plain = read_losses(train("plain", *saving))
    straight, resumed = train("straight", *saving, "model.speed=auto"), train("resumed", *saving, "model.speed=auto")
    speed = json.loads((straight / "run.json").read_text())["speed"]
    assert speed["ways"] == [way], speed["reason"]
    assert read_losses(straight) == pytest.approx(plain, rel=ROUNDING)
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    torch._dynamo.reset()
    train("resumed", *saving, "model.speed=auto", resume=True)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flash_attention_keeps_packed_documents_apart(train, read_losses, let_win):
    let_win("flash attention")
    one = [*KINDS["bf16"], "trainer.max_steps=1", "trainer.per_device_train_batch_size=32"]
    apart, packed = train("apart", *one), train("packed", *one, "trainer.packing=true", "model.speed=auto")
    assert "flash attention" in json.loads((packed / "run.json").read_text())["speed"]["ways"]
    assert read_losses(packed) == pytest.approx(read_losses(apart), rel=ROUNDING)
