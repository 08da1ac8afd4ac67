"""`model.speed: auto`: what is faster and computes the same is used, and a resumed run does as it began.

torch's eager backend stands for its compiler, which takes a minute: layers are traced as for it, and run without new kernels.
"""

import contextlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from finetune.errors import RecipeError, TrainingError
from finetune.runs.resuming import SpeedChoice
from finetune.training.run import run_training
from finetune.training.speed import compiled_layers, speed_trial, ways
from finetune.training.speed.compiled_layers import find_missing_compiler
from finetune.training.speed.passes import Pass, compare_passes
from finetune.training.speed.speed_trial import find_run_obstacle, try_speed
from finetune.training.speed.ways import WAYS, check_choice, read_choice

# torch looks at the gradients of inner tensors while it traces a layer, and warns itself of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

AUTO = "model.speed=auto"
COMPILED, COPIES = "compiled layers", "adapter copies"
SAVING = [AUTO, "trainer.save_strategy=steps", "trainer.save_steps=2"]
TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
BEFORE = Pass(loss=2.0, norm=1.0, first_seconds=1.0, seconds=1.0)


@pytest.fixture
def quick(monkeypatch, let_win):
    """Let the compiler take seconds, count as faster, and pay for every run."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "COMPILER", {"backend": "aot_eager", "dynamic": True})
    monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", 0)
    let_win(COMPILED)
    yield
    torch._dynamo.reset()


@pytest.fixture
def patient(let_win):
    """Let copies count as faster, whatever the clock of a busy machine says."""
    let_win(COPIES)


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
    ("after", "is_used", "words"),
    [
        (replace(BEFORE, seconds=0.5), True, "0.500 s a batch in place of 1.000 s"),
        (replace(BEFORE, seconds=0.99), False, "not faster"),
        (replace(BEFORE, seconds=0.5, loss=2.03), False, "something else"),
        (replace(BEFORE, seconds=0.5, loss=2.01), True, "loss 2.0100 and 2.0000"),
        (replace(BEFORE, seconds=0.5, norm=1.05), False, "something else"),
        (replace(BEFORE, seconds=0.5, loss=math.nan), False, "something else"),
    ],
)
def test_a_way_is_used_where_it_is_faster_and_the_same(after, is_used, words):
    verdict = compare_passes(WAYS[COMPILED], BEFORE, BEFORE, after, torch.bfloat16)
    assert verdict.is_used is is_used
    assert words in verdict.reason


def test_copies_must_give_the_same_bits_as_what_they_are_added_to():
    def compare(after, best=BEFORE):
        return compare_passes(WAYS[COPIES], BEFORE, best, after, torch.bfloat16).is_used

    other = replace(BEFORE, loss=math.nextafter(2.0, 3.0))
    assert compare(BEFORE)
    assert not compare(other)
    assert compare(other, best=other)
    # A kernel that adds in another order each time differs from itself.
    moved = replace(BEFORE, norm=1.001)
    assert not compare(moved)
    assert compare(moved, best=replace(BEFORE, spread=0.001))


def test_time_is_compared_with_the_best_so_far():
    """What is tried second must be faster than the first, not only than the plain pass; its figures must be the plain ones."""
    best = replace(BEFORE, seconds=0.5, loss=2.01)
    assert not compare_passes(WAYS[COMPILED], BEFORE, best, replace(BEFORE, seconds=0.6), torch.bfloat16).is_used
    assert not compare_passes(
        WAYS[COMPILED], BEFORE, best, replace(BEFORE, seconds=0.4, loss=2.02), torch.bfloat16
    ).is_used
    assert compare_passes(WAYS[COMPILED], BEFORE, best, replace(BEFORE, seconds=0.4), torch.bfloat16).is_used


def test_a_short_run_in_float32_is_left_alone(train):
    speed = read_speed(train("run", AUTO))
    assert speed["ways"] == []
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
    assert read_speed(copied)["ways"] == [COPIES]
    assert_same_bits(plain, copied)
    assert read_metrics(plain) == read_metrics(copied)


def test_a_resumed_run_makes_its_copies_anew(train, patient):
    straight, resumed = (train(name, "model.dtype=bfloat16", *SAVING) for name in ("straight", "resumed"))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    train("resumed", "model.dtype=bfloat16", *SAVING, resume=True)
    assert_same_bits(straight, resumed)


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_pairs_train_the_same_with_copies(make_pairs_recipe, patient, method):
    """The first logged figures of ORPO, CPO and SimPO were means over the first step and the passes of the trial."""
    runs = [
        Path(run_training(make_pairs_recipe(name, method, "model.dtype=bfloat16", *more)).run)
        for name, more in (("plain", []), ("copied", [AUTO]))
    ]
    assert read_speed(runs[1])["ways"] == [COPIES]
    assert_same_bits(*runs)
    assert read_metrics(runs[0]) == read_metrics(runs[1])


def test_dora_has_no_copies(train):
    """Its norms are computed from the float32 matrices."""
    run = train("run", AUTO, "model.dtype=bfloat16", "adapter.dora=true", "trainer.max_steps=1")
    assert read_speed(run)["ways"] == []


def test_compiled_layers_train_the_same_run(train, read_losses, quick, monkeypatch):
    """The trial leaves random numbers, gradients, token counts and metrics as they were, and the layers are plain again afterwards."""
    seen, find = [], ways.list_layers
    monkeypatch.setattr(ways, "list_layers", lambda model: seen.append(find(model)) or seen[-1])
    settings = ["trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.gradient_checkpointing=true"]
    plain = train("plain", *settings, "adapter.dropout=0.1")
    compiled = train("compiled", AUTO, *settings, "adapter.dropout=0.1")
    assert read_speed(compiled)["ways"] == [COMPILED]
    assert read_losses(compiled) == pytest.approx(read_losses(plain), rel=1e-5)
    metrics = read_metrics(plain), read_metrics(compiled)
    assert [sorted(line) for line in metrics[0]] == [sorted(line) for line in metrics[1]]
    assert [line.get("num_tokens") for line in metrics[0]] == [line.get("num_tokens") for line in metrics[1]]
    assert {len(layers) for layers in seen} == {4}
    assert not any("forward" in vars(module) for layer in seen[0] for module in layer.modules())


def test_layers_that_compute_something_else_stay_uncompiled(train, quick, monkeypatch):
    """The run is the one without the key, to the bit."""

    def compile_wrongly(forward, **options):
        return lambda *arguments, **values: 1.1 * forward(*arguments, **values)

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    run = train("wrong", AUTO)
    assert "something else" in read_speed(run)["reason"]
    assert_same_bits(train("plain"), run)


def test_a_resumed_run_does_as_it_began(train, quick, monkeypatch):
    """Compiled layers round differently, so a run that began with them must go on with them, whatever a new trial would find.

    Without a compiler it is refused: torch ended it with an error of its own at the first batch, when files had been written.
    """
    straight, resumed = (train(name, *SAVING) for name in ("straight", "resumed"))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    before = {file: file.read_bytes() for file in resumed.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch, pytest.raises(TrainingError) as refusal:
        patch.setattr(shutil, "which", lambda name: None)
        train("resumed", *SAVING, resume=True)
    for words in (str(resumed), "began with compiled layers", "no C++ compiler is installed", "another output"):
        assert words in str(refusal.value)
    assert {file: file.read_bytes() for file in resumed.rglob("*") if file.is_file()} == before
    monkeypatch.setattr(speed_trial, "WORTHWHILE_SECONDS", math.inf)
    train("resumed", *SAVING, resume=True)
    assert read_speed(resumed)["ways"] == [COMPILED]
    assert_same_bits(straight, resumed)


def test_obstacles_are_named(make_recipe):
    online = make_recipe("run", "method=grpo", "rewards.rules={one_sentence: 1.0}")
    assert "generates answers" in find_run_obstacle(online)
    assert find_run_obstacle(make_recipe("other")) is None
    assert "mps device" in find_missing_compiler(torch.device("mps"))


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_of_several_processes_writes_the_record(make_recipe, monkeypatch, is_first):
    """Both wrote run.json by way of the same partial file, and a launch of two ended in a FileNotFoundError most often."""
    monkeypatch.setattr(speed_trial, "WAYS", {})
    callbacks, decided, choice = list[Any](), list[SpeedChoice](), SpeedChoice((), "several processes share the run")
    trainer: Any = SimpleNamespace(args=SimpleNamespace(bf16=False, fp16=False), add_callback=callbacks.append)
    with try_speed(trainer, make_recipe("run", AUTO), decided.append, choice):
        state = TrainerState(is_world_process_zero=is_first)
        callbacks[0].on_train_begin(trainer.args, state, TrainerControl())
    assert decided == [choice] * is_first


def test_an_unknown_value_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"model\.speed"):
        make_recipe("run", "model.speed=fast")


@pytest.fixture
def begun(tmp_path):
    """Return a function that makes a run directory whose record says something of the speed."""

    def make(speed):
        (tmp_path / "run.json").write_text(json.dumps({"speed": speed}), encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"way": COPIES, "reason": "r"}, SpeedChoice((COPIES,), "r")),
        ({"way": "none", "reason": "r"}, SpeedChoice((), "r")),
        ({"ways": ["flash attention", COPIES], "reason": "r"}, SpeedChoice(("flash attention", COPIES), "r")),
        ({"ways": [], "reason": "r"}, SpeedChoice((), "r")),
        (None, SpeedChoice((), "the run began without")),
    ],
)
def test_records_are_read_as_this_and_older_versions_wrote_them(begun, recorded, expected):
    """The first version wrote one way, or "none"."""
    assert read_choice(begun(recorded)) == expected


def test_a_way_of_a_newer_version_is_refused(begun):
    with pytest.raises(TrainingError, match="warp drive"):
        read_choice(begun({"ways": ["warp drive"], "reason": "r"}))


@pytest.mark.parametrize(
    "damaged", ["fast", [COPIES], {}, {"reason": "r"}, {"ways": COPIES}, {"ways": [[COPIES]]}, {"way": 1}]
)
def test_a_damaged_record_is_refused(begun, damaged):
    """A record that was no object counted as one of a run that had begun without, and such a run went on with other bits."""
    with pytest.raises(TrainingError, match=r"run\.json: speed: "):
        read_choice(begun(damaged))


@pytest.mark.parametrize(("status", "trains"), [("running", True), ("saving", False), ("finished", False)])
def test_a_run_that_trains_no_more_needs_nothing(begun, status, trains):
    """A result is whole unless the run was still training; such a run is only completed, or told that it has finished."""
    run = begun({"ways": ["flash attention"], "reason": "r"})
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": status}), encoding="utf-8")
    (run / "adapter").mkdir()
    with pytest.raises(TrainingError, match="began with flash attention") if trains else contextlib.nullcontext():
        check_choice(run, torch.device("cpu"))
