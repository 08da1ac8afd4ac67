"""`model.speed: auto`: what is faster and computes the same is used, and a resumed run does as it began.

torch's eager backend stands for its compiler, which takes a minute: layers are traced as for it, and run without new kernels.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import RecipeError
from finetune.training.run import run_training
from finetune.training.speed import compiled_layers, speed_trial
from finetune.training.speed.compiled_layers import find_missing_compiler
from finetune.training.speed.speed_trial import Pass, compare_passes, find_obstacle

# torch looks at the gradients of inner tensors while it traces a layer, and warns itself of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

AUTO = "model.speed=auto"
COMPILED, COPIES = "compiled layers", "adapter copies"
SAVING = [AUTO, "trainer.save_strategy=steps", "trainer.save_steps=2"]
TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
HALF = torch.finfo(torch.bfloat16).eps
BEFORE = Pass(loss=2.0, norm=1.0, first_seconds=1.0, seconds=1.0)


@pytest.fixture
def quick(monkeypatch):
    """Let the compiler take seconds, count as faster, and pay for every run."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "COMPILER", {"backend": "aot_eager", "dynamic": True})
    monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", 0)
    monkeypatch.setitem(speed_trial._FASTER, COMPILED, math.inf)
    yield
    torch._dynamo.reset()


@pytest.fixture
def patient(monkeypatch):
    """Let copies count as faster, whatever the clock of a busy machine says."""
    monkeypatch.setitem(speed_trial._FASTER, COPIES, math.inf)


def read_speed(run):
    return json.loads((run / "run.json").read_text()).get("speed")


def read_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_bits(first, second):
    pair = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second)]
    assert pair[0].keys() == pair[1].keys()
    assert not [name for name in pair[0] if not torch.equal(pair[0][name], pair[1][name])]


@pytest.mark.parametrize(
    ("after", "way", "words"),
    [
        (replace(BEFORE, seconds=0.5), COMPILED, "0.500 s a batch in place of 1.000 s"),
        (replace(BEFORE, seconds=0.99), "none", "not faster"),
        (replace(BEFORE, seconds=0.5, loss=2.03), "none", "something else"),
        (replace(BEFORE, seconds=0.5, loss=2.01), COMPILED, "loss 2.0100 and 2.0000"),
        (replace(BEFORE, seconds=0.5, norm=1.05), "none", "something else"),
        (replace(BEFORE, seconds=0.5, loss=math.nan), "none", "something else"),
    ],
)
def test_compiled_layers_are_used_where_they_are_faster_and_the_same(after, way, words):
    choice = compare_passes(COMPILED, BEFORE, after, HALF)
    assert choice.way == way
    assert words in choice.reason


def test_copies_must_give_the_same_bits():
    assert compare_passes(COPIES, BEFORE, BEFORE, 0.0).way == COPIES
    assert compare_passes(COPIES, BEFORE, replace(BEFORE, loss=math.nextafter(2.0, 3.0)), 0.0).way == "none"


def test_a_short_run_in_float32_is_left_alone(train):
    speed = read_speed(train("run", AUTO))
    assert speed["way"] == "none"
    assert "compiling pays from 10 min on" in speed["reason"]


def test_without_the_key_nothing_is_tried(train):
    assert read_speed(train("run")) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.dropout=0.1", "trainer.gradient_checkpointing=true", "trainer.gradient_accumulation_steps=2"],
        [
            "model.quantize=nf4",
            "adapter.train_tokens=[104, 105]",
            "trainer.eval_strategy=steps",
            "trainer.eval_steps=2",
        ],
    ],
)
def test_copies_train_the_same_run_to_the_bit(train, patient, overrides):
    settings = ["model.dtype=bfloat16", *overrides]
    plain, copied = train("plain", *settings), train("copied", *settings, AUTO)
    assert read_speed(copied)["way"] == COPIES
    assert_same_bits(plain, copied)
    assert read_metrics(plain) == read_metrics(copied)


def test_a_resumed_run_makes_its_copies_anew(train, patient):
    straight, resumed = (train(name, "model.dtype=bfloat16", *SAVING) for name in ("straight", "resumed"))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    train("resumed", "model.dtype=bfloat16", *SAVING, resume=True)
    assert_same_bits(straight, resumed)


def test_pairs_train_the_same_with_copies(make_pairs_recipe, patient):
    runs = [
        Path(run_training(make_pairs_recipe(name, "dpo", "model.dtype=bfloat16", *more)).run)
        for name, more in (("plain", []), ("copied", [AUTO]))
    ]
    assert read_speed(runs[1])["way"] == COPIES
    assert_same_bits(*runs)


def test_dora_has_no_copies(train):
    """Its norms are computed from the float32 matrices."""
    run = train("run", AUTO, "model.dtype=bfloat16", "adapter.dora=true", "trainer.max_steps=1")
    assert read_speed(run)["way"] == "none"


def test_compiled_layers_train_the_same_run(train, read_losses, quick, monkeypatch):
    """The trial leaves random numbers, gradients, token counts and metrics as they were, and the layers are plain again afterwards."""
    seen, find = [], speed_trial.list_layers
    monkeypatch.setattr(speed_trial, "list_layers", lambda model: seen.append(find(model)) or seen[-1])
    settings = ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.gradient_checkpointing=true"]
    plain = train("plain", *settings, "adapter.dropout=0.1")
    compiled = train("compiled", AUTO, *settings, "adapter.dropout=0.1")
    assert read_speed(compiled)["way"] == COMPILED
    assert read_losses(compiled) == pytest.approx(read_losses(plain), rel=1e-5)
    metrics = read_metrics(plain), read_metrics(compiled)
    assert [sorted(line) for line in metrics[0]] == [sorted(line) for line in metrics[1]]
    assert [line.get("num_tokens") for line in metrics[0]] == [line.get("num_tokens") for line in metrics[1]]
    assert [len(layers) for layers in seen] == [4]
    assert not any("forward" in vars(layer) for layer in seen[0])


def test_layers_that_compute_something_else_stay_uncompiled(train, quick, monkeypatch):
    """The run is the one without the key, to the bit."""

    def compile_wrongly(forward, **options):
        return lambda *arguments, **values: 1.1 * forward(*arguments, **values)

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    run = train("wrong", AUTO)
    assert "something else" in read_speed(run)["reason"]
    assert_same_bits(train("plain"), run)


def test_a_resumed_run_does_as_it_began(train, quick, monkeypatch):
    """Compiled layers round differently, so a run that began with them must go on with them, whatever a new trial would find."""
    straight, resumed = (train(name, *SAVING) for name in ("straight", "resumed"))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", math.inf)
    train("resumed", *SAVING, resume=True)
    assert read_speed(resumed)["way"] == COMPILED
    assert_same_bits(straight, resumed)


def test_obstacles_are_named(make_recipe):
    online = make_recipe("run", "method=grpo", "rewards.rules={one_sentence: 1.0}")
    assert "generates answers" in find_obstacle(online)
    assert find_obstacle(make_recipe("other")) is None
    assert "mps device" in find_missing_compiler(torch.device("mps"))


def test_an_unknown_value_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"model\.speed"):
        make_recipe("run", "model.speed=fast")
