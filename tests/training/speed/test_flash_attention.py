"""FlashAttention in training passes: the same losses, documents and padding kept out, and the plain kernel everywhere else."""

import json
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.compat import name_attention
from finetune.training import run as training
from finetune.training.pretraining.packed_documents import keep_documents_apart
from finetune.training.speed.flash_attention import FlashAttention, find_missing_flash, keep_order_of_sums
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.native.modeling import YuLanMiniForCausalLM

FLASH, AUTO = "flash attention", "model.speed=auto"
ORDER = "FLASH_ATTENTION_DETERMINISTIC"
HALF = ["model.dtype=bfloat16", "trainer.max_steps=2"]
ROUNDING = torch.finfo(torch.bfloat16).eps
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "native": (YuLanMiniForCausalLM, YuLanMiniConfig)}


def read_speed(run):
    return json.loads((run / "run.json").read_text())["speed"]


def make_model(kind):
    model_class, config_class = MODELS[kind]
    torch.manual_seed(0)
    return model_class(config_class(**SIZES)).to(torch.bfloat16)


def compute_logits(model, batch, switch=None):
    """Return what a batch of training gives, with a switch on or without."""
    model.train()
    if switch is None:
        return model(**batch, use_cache=False).logits.detach().float()
    switch.switch_on()
    with switch.around_batch():
        logits = compute_logits(model, batch)
    switch.switch_off()
    return logits


def test_training_uses_it_and_evaluation_does_not(train, read_losses, flash, install, monkeypatch):
    """Gradient checkpointing computes the layers once more in the backward pass: three calls for each layer and two for each batch."""
    monkeypatch.delenv(ORDER, raising=False)
    settings = [*HALF, "trainer.gradient_checkpointing=true", "trainer.eval_strategy=steps", "trainer.eval_steps=1"]
    plain = train("plain", *settings)
    assert flash.calls == []
    install(FLASH, "adapter copies")
    run = train("flash", *settings, AUTO, "answers=2")
    assert read_speed(run)["ways"] == [FLASH, "adapter copies"]
    assert read_losses(run) == pytest.approx(read_losses(plain), rel=ROUNDING)
    layers, trial, steps = 4, 4, 2
    # Each batch of 8 rows has padding. Copies of the adapter are tried on top of the kernel, so there are two trials.
    passes = 2 * layers * (2 * trial + steps)
    assert (flash.calls, flash.orders) == ([(8, True)] * passes, {True})
    metrics = [
        [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()] for found in (plain, run)
    ]
    evaluated = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in metrics]
    assert len(evaluated[0]) == 2
    assert evaluated[1] == pytest.approx(evaluated[0], rel=ROUNDING)


@pytest.mark.parametrize(("asked", "expected"), [(None, True), ("0", False)])
def test_sums_are_added_in_the_same_order_unless_a_person_says_otherwise(flash, monkeypatch, asked, expected):
    monkeypatch.delenv(ORDER, raising=False)
    if asked is not None:
        monkeypatch.setenv(ORDER, asked)
    model = make_model("llama")
    with keep_order_of_sums():
        compute_logits(model, {"input_ids": torch.arange(12)[None]}, FlashAttention(model, torch.bfloat16, "auto"))
    assert flash.orders == {expected}
    assert os.environ.get(ORDER) == asked


def test_a_kernel_that_the_recipe_names_adds_in_the_same_order(train, flash, monkeypatch):
    """The backward pass adds in another order each time unless it is told, and a resumed run was another run.

    The kernel is put where `model.attention: flash_attention_2` puts it, which transformers refuses here for want of the package.
    """
    monkeypatch.delenv(ORDER, raising=False)
    build = training.build_model

    def build_flash(*arguments, **options):
        trained = build(*arguments, **options)
        name_attention(trained.model.get_base_model().config, "stand_in")
        return trained

    monkeypatch.setattr(training, "build_model", build_flash)
    train("run", "model.dtype=bfloat16", "trainer.max_steps=1", "trainer.per_device_train_batch_size=1")
    assert flash.orders == {True}


def test_packing_trains_the_same_tokens_as_separate_rows(train, read_losses, flash):
    one = [*HALF[:1], "trainer.max_steps=1", "trainer.per_device_train_batch_size=32"]
    apart, packed = train("apart", *one), train("packed", *one, "trainer.packing=true", AUTO)
    assert read_speed(packed)["ways"] == [FLASH]
    assert {documents for documents, _ in flash.calls} == {32}
    assert read_losses(packed) == pytest.approx(read_losses(apart), rel=ROUNDING)


def test_a_kernel_that_lets_documents_see_each_other_is_not_used(train, flash):
    flash.keeps_apart = False
    run = train("run", *HALF[:1], "trainer.max_steps=1", "trainer.packing=true", AUTO)
    assert read_speed(run)["ways"] == []
    assert "flash attention: computes something else" in read_speed(run)["reason"]


@pytest.mark.parametrize("kind", MODELS)
def test_several_packed_rows_in_a_batch(flash, kind):
    """transformers reads positions only of a batch of one row; without being told, documents of two rows saw those before them."""
    model, ids = make_model(kind), torch.arange(24).view(2, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "position_ids": positions}
    plain = compute_logits(model, batch)
    switch = FlashAttention(model, torch.bfloat16, "auto")
    told = compute_logits(model, batch, switch)
    assert {documents for documents, _ in flash.calls} == {4}
    assert (told - plain).abs().max() <= 4 * ROUNDING * plain.abs().max()
    # As a recipe's own choice of a flash kernel, which pre-training tells too.
    model.set_attn_implementation("stand_in")
    untold = compute_logits(model, batch)
    assert (untold - plain).abs().max() > 0.05 * plain.abs().max()
    keep_documents_apart(model)
    assert torch.equal(compute_logits(model, batch), told)


@pytest.mark.parametrize("kind", MODELS)
def test_padding_is_cut_out(flash, kind):
    model, ids = make_model(kind), torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    plain = compute_logits(model, batch)
    flashed = compute_logits(model, batch, FlashAttention(model, torch.bfloat16, "auto"))
    assert {documents for documents, _ in flash.calls} == {2}
    difference = (flashed - plain)[mask.bool()].abs().max()
    assert difference <= 4 * ROUNDING * plain.abs().max()


def test_the_kernel_is_the_plain_one_after_an_error(flash):
    model = make_model("llama")
    switch = FlashAttention(model, torch.bfloat16, "auto")
    switch.switch_on()
    assert name_attention(model.config) == "sdpa"
    with pytest.raises(KeyError), switch.around_batch():
        assert name_attention(model.config) == "stand_in"
        raise KeyError
    assert name_attention(model.config) == "sdpa"
    switch.switch_off()
    with switch.around_batch():
        assert name_attention(model.config) == "sdpa"
    assert not model.base_model._forward_pre_hooks


def test_obstacles():
    model = make_model("llama")
    assert "asks for sdpa" in FlashAttention(model, torch.bfloat16, "sdpa").find_obstacle()
    assert "float32" in FlashAttention(model, torch.float32, "auto").find_obstacle()
    assert FlashAttention(model, torch.float16, "auto").find_obstacle() is None
    assert "GPU" in find_missing_flash(torch.device("cpu"))
    if not torch.cuda.is_available():  # the package is of no use without
        assert "pip install flash-attn" in find_missing_flash(torch.device("cuda"))
