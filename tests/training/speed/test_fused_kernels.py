"""Fused kernels in training passes: norms and gates by other functions, plain modules everywhere else; Liger's own where it is there."""

import inspect
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from finetune.errors import TrainingError
from finetune.models.streaming.from_main_memory import list_layers
from finetune.training.speed import fused_kernels
from finetune.training.speed.fused_kernels import FusedKernels, Kernels, find_missing_kernels
from finetune.training.speed.ways import WAYS

FUSED = "fused kernels"


@pytest.fixture
def calls(monkeypatch, install):
    """Let plain arithmetic stand for Liger's functions, with their arguments; return the names of those that were called."""
    names = []

    def norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):  # noqa: N803 - Liger's names
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        names.append("norm")
        wide = X.float()
        return W * (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(X.dtype)

    def gate(a, b):
        names.append("gate")
        return (a.float() * a.float().sigmoid()).to(b.dtype) * b

    monkeypatch.setattr(fused_kernels, "load_kernels", lambda: Kernels(norm, gate))
    install(FUSED)
    return names


def read_speed(run):
    return json.loads((run / "run.json").read_text())["speed"]


def make_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))


def compute_gradients(model, ids):
    """Return the loss of a batch, and all gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_only_layers_that_train_use_them(calls):
    model, ids = make_model(), torch.arange(24).view(2, 12)
    loss, gradients = compute_gradients(model.train(), ids)
    switch = FusedKernels(list_layers(model))
    switch.switch_on()
    fused_loss, fused_gradients = compute_gradients(model, ids)
    assert sorted(calls) == ["gate"] * 2 + ["norm"] * 4  # the norm after the last layer is not one of them
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(fused_gradients[name], gradients[name], rtol=1e-4, atol=1e-7) for name in gradients)
    model.eval()
    compute_gradients(model, ids)
    assert len(calls) == 6
    switch.switch_off()
    again, gradients_again = compute_gradients(model.train(), ids)
    assert len(calls) == 6
    assert again == loss
    assert all(torch.equal(gradients_again[name], gradients[name]) for name in gradients)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_uses_them_with_copies_and_resumes_with_them(train, read_losses, calls, install, monkeypatch):
    """Without the package a resumed run is refused, before anything is written."""
    install(FUSED, "adapter copies")
    half = ["model.dtype=bfloat16", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=4"]
    expected = read_losses(train("plain", *half))
    run = train("run", *half, "model.speed=auto")
    assert read_speed(run)["ways"] == [FUSED, "adapter copies"]
    assert read_losses(run) == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(run / name)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setitem(WAYS, FUSED, replace(WAYS[FUSED], find_missing=find_missing_kernels))
        if not torch.cuda.is_available():
            with pytest.raises(TrainingError, match=r"began with fused kernels.*Liger's kernels need an NVIDIA GPU"):
                train("run", *half, "model.speed=auto", resume=True)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    train("run", *half, "model.speed=auto", resume=True)
    assert read_speed(run)["ways"] == [FUSED, "adapter copies"]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_a_kernel_that_cannot_run_here_is_left_out(train, install, monkeypatch):
    """As a card that a library does not know, or a package that was built for another version of torch."""

    def load():
        raise ImportError("undefined symbol\nand more")

    monkeypatch.setattr(fused_kernels, "load_kernels", load)
    install(FUSED)
    speed = read_speed(train("run", "model.speed=auto", "trainer.max_steps=1"))
    assert speed["ways"] == []
    assert "fused kernels: cannot be used here: ImportError: undefined symbol;" in speed["reason"]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(fused_kernels, "_PACKAGES", ("torch", "no_such_kernels"))
    assert "the package no_such_kernels is not installed" in find_missing_kernels(torch.device("cuda"))
    assert FusedKernels([torch.nn.Linear(2, 2)]).find_obstacle() is not None


@pytest.fixture(scope="module")
def liger():
    """Import Liger's functions, where they are installed."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    return fused_kernels.load_kernels()


def test_liger_takes_these_arguments(liger):
    inspect.signature(liger.norm).bind(None, None, 1e-6, offset=0.0, casting_mode="llama", in_place=False)
    inspect.signature(liger.gate).bind(None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_computes_what_the_plain_modules_compute(liger, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=1920, intermediate_size=4800)
    norm, mlp = (module.to("cuda", dtype) for module in (LlamaRMSNorm(1920, 1e-6), LlamaMLP(config)))
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    layer, states = torch.nn.Sequential(norm, mlp).train(), torch.randn(2, 17, 1920, device="cuda", dtype=dtype)
    switch, found = FusedKernels([layer]), []
    for is_on in (False, True):
        if is_on:
            switch.switch_on()
        inputs = states.clone().requires_grad_()
        output = layer(inputs)
        functional.mse_loss(output, torch.ones_like(output)).backward()
        found.append((output.detach().float(), inputs.grad.float()))
    switch.switch_off()
    limit = max(2 * torch.finfo(dtype).eps, 1e-4)
    for plain, fused in zip(*found, strict=True):
        assert (plain - fused).norm() <= limit * plain.norm()
