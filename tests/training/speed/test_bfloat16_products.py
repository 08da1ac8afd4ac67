"""Products in bfloat16 on a processor that has instructions for it: in training passes only, and those of accelerate's own autocast."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.evaluation.token_loss import evaluate_path
from finetune.models.precision import Precision, find_missing_instructions
from finetune.training import run as run_module

PRODUCTS = "bfloat16 products"
SAVING = ["model.speed=auto", "adapter.dropout=0.1", "trainer.save_strategy=steps", "trainer.save_steps=2"]


@pytest.fixture(autouse=True)
def new_processor(install):
    """Let this processor have the instructions, whichever it is: without them the products are the same, and slower."""
    install(PRODUCTS)


def read_weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def is_same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_passes_are_those_of_autocast_and_evaluations_are_in_float32(
    train, read_losses, monkeypatch, tmp_path
):
    auto = train("auto", "model.speed=auto", "trainer.gradient_checkpointing=true")
    record = json.loads((auto / "run.json").read_text())
    assert record["speed"]["ways"] == [PRODUCTS]
    scores = evaluate_path(str(auto), [tmp_path / "held.jsonl"], 128)
    assert record["result"]["eval_loss"] == pytest.approx(scores.loss, rel=1e-6)
    plain = train("plain", "trainer.gradient_checkpointing=true")
    assert read_losses(plain) != read_losses(auto)
    assert read_losses(plain) == pytest.approx(read_losses(auto), rel=2e-2)
    # accelerate's autocast, with weights in float32: a recipe cannot ask for it, since bfloat16 also narrows the base.
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "choose_precision", lambda *arguments, **options: Precision(torch.float32, "bf16"))
        cast = train("cast", "trainer.gradient_checkpointing=true")
    assert read_losses(cast) == read_losses(auto)
    assert is_same(read_weights(cast), read_weights(auto))


def stop(*arguments):
    raise KeyboardInterrupt


def test_a_resumed_run_goes_on_in_bfloat16(train, monkeypatch):
    """A run that was resumed, and stopped again before its first step, forgot what it had chosen, and went on in float32."""
    straight, resumed = (train(name, *SAVING) for name in ("straight", "resumed"))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(resumed / name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "_train", stop)
        train("resumed", *SAVING, resume=True)
    train("resumed", *SAVING, resume=True)
    assert is_same(read_weights(straight), read_weights(resumed))


@pytest.mark.parametrize(
    ("dtype", "reason"), [("float32", "model.dtype asks for float32"), ("bfloat16", "computes in 16 bits already")]
)
def test_a_recipe_that_names_a_type_gets_it(train, dtype, reason):
    run = train("run", "model.speed=auto", f"model.dtype={dtype}", "trainer.max_steps=1")
    speed = json.loads((run / "run.json").read_text())["speed"]
    assert speed["ways"] == []
    assert f"{PRODUCTS}: {reason}" in speed["reason"] or f"{PRODUCTS}: the run {reason}" in speed["reason"]


@pytest.mark.parametrize(
    ("capabilities", "is_there"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
    ],
)
def test_instructions_are_those_that_torch_finds(monkeypatch, capabilities, is_there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    found = find_missing_instructions(torch.device("cpu"))
    assert found is None if is_there else "no instructions for bfloat16" in found
    assert "a cuda device" in find_missing_instructions(torch.device("cuda"))


def test_a_torch_that_tells_no_instructions_has_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert "no instructions for bfloat16" in find_missing_instructions(torch.device("cpu"))
