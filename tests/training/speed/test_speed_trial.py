"""`model.speed: auto`: compiled layers are used where they are faster and compute the same, and a resumed run does as it began.

torch's eager backend stands for its compiler, which takes a minute: the layers are traced as for it, and run without new kernels.
"""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import RecipeError
from finetune.training.speed import compiled_layers, speed_trial
from finetune.training.speed.speed_trial import Pass, compare_passes, find_obstacle

# torch looks at the gradients of inner tensors while it traces a layer, and warns itself of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
AUTO = "model.speed=auto"
HALF = torch.finfo(torch.bfloat16).eps
BEFORE = Pass(loss=2.0, norm=1.0, first_seconds=1.0, seconds=1.0)


@pytest.fixture
def quick(monkeypatch):
    """Let the compiler take seconds, count as faster, and pay for every run."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "COMPILER", {"backend": "aot_eager", "dynamic": True})
    monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", 0)
    monkeypatch.setattr(speed_trial, "_FASTER", math.inf)
    yield
    torch._dynamo.reset()


def read_speed(run):
    return json.loads((run / "run.json").read_text()).get("speed")


@pytest.mark.parametrize(
    ("after", "compiled", "words"),
    [
        (replace(BEFORE, seconds=0.5), True, "0.500 s a batch in place of 1.000 s"),
        (replace(BEFORE, seconds=0.99), False, "not faster"),
        (replace(BEFORE, seconds=0.5, loss=2.03), False, "something else"),
        (replace(BEFORE, seconds=0.5, loss=2.01), True, "loss 2.0100 and 2.0000"),
        (replace(BEFORE, seconds=0.5, norm=1.05), False, "something else"),
        (replace(BEFORE, seconds=0.5, loss=math.nan), False, "something else"),
    ],
)
def test_layers_are_compiled_where_they_are_faster_and_the_same(after, compiled, words):
    choice = compare_passes(BEFORE, after, HALF)
    assert choice.compiled == compiled
    assert words in choice.reason


def test_float32_allows_less_difference():
    after = replace(BEFORE, seconds=0.5, loss=2.001)
    assert not compare_passes(BEFORE, after, torch.finfo(torch.float32).eps).compiled


def test_a_short_run_is_not_compiled(train):
    speed = read_speed(train("run", AUTO))
    assert not speed["compiled"]
    assert "compiling pays from 10 min on" in speed["reason"]


def test_without_the_key_nothing_is_tried(train):
    assert read_speed(train("run")) is None


def test_compiled_layers_train_the_same_run(train, read_losses, quick, monkeypatch):
    """The trial leaves random numbers, gradients, token counts and metrics as they were, and the layers are plain again afterwards."""
    seen, find = [], speed_trial.find_layers
    monkeypatch.setattr(speed_trial, "find_layers", lambda model: seen.append(find(model)) or seen[-1])
    settings = [
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
        "trainer.gradient_checkpointing=true",
        "adapter.dropout=0.1",
    ]
    plain = train("plain", *settings)
    compiled = train("compiled", AUTO, *settings)
    assert read_speed(compiled)["compiled"]
    assert read_losses(compiled) == pytest.approx(read_losses(plain), rel=1e-5)
    metrics = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (plain, compiled)
    ]
    assert [sorted(line) for line in metrics[0]] == [sorted(line) for line in metrics[1]]
    assert [line.get("num_tokens") for line in metrics[0]] == [line.get("num_tokens") for line in metrics[1]]
    assert [len(layers.layers) for layers in seen] == [4, 4]
    assert not any("forward" in vars(layer) for layers in seen for layer in layers.layers)


def test_layers_that_compute_something_else_stay_uncompiled(train, quick, monkeypatch):
    """Losses are those of a run without the key, to the bit."""
    compile_layer = torch.compile

    def compile_wrongly(forward, **options):
        compiled = compile_layer(forward, **options)
        return lambda *arguments, **values: 1.1 * compiled(*arguments, **values)

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    run = train("wrong", AUTO)
    assert "something else" in read_speed(run)["reason"]
    plain = load_file(train("plain") / "adapter" / "adapter_model.safetensors")
    assert all(
        torch.equal(plain[name], tensor)
        for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items()
    )


def test_a_resumed_run_does_as_it_began(train, quick, monkeypatch):
    """Compiled layers round differently, so a run that began with them must go on with them, whatever a new trial would find."""
    saving = [AUTO, "trainer.save_strategy=steps", "trainer.save_steps=2"]
    straight, resumed = train("straight", *saving), train("resumed", *saving)
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", math.inf)
    train("resumed", *saving, resume=True)
    assert read_speed(resumed) == read_speed(straight) | {"reason": read_speed(resumed)["reason"]}
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("device", "method", "words"), [("mps", "sft", "mps device"), ("cpu", "grpo", "generates answers")]
)
def test_obstacles_are_named(make_recipe, device, method, words):
    rules = ["rewards.rules={one_sentence: 1.0}"] if method == "grpo" else []
    recipe = make_recipe("run", f"method={method}", *rules)
    assert words in find_obstacle(recipe, torch.device(device))


def test_an_unknown_value_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"model\.speed"):
        make_recipe("run", "model.speed=fast")
