"""Layers of a frozen base in main memory, two of them on the device: the bits of a base that is there as a whole."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter
from finetune.models.precision import Precision
from finetune.models.streaming.from_main_memory import LayerStream, list_layers, list_matrices, stream_layers
from finetune.recipe.sections import AdapterSection, ModelSection

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 35).reshape(2, 16)
KINDS = {
    "nf4": ("nf4", torch.float32),
    "nf4 in bfloat16": ("nf4", torch.bfloat16),
    "int8": ("int8", torch.float32),
    "float32": ("none", torch.float32),
    "bfloat16": ("none", torch.bfloat16),
}


@pytest.fixture
def make_model(tmp_path):
    """Return a function that loads a model of some layers, biases included, with an adapter that already changes something."""

    def make(count, kind="nf4", **adapter):
        folder = tmp_path / str(count)
        if not folder.is_dir():
            torch.manual_seed(0)
            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
            config = LlamaConfig(num_hidden_layers=count, vocab_size=80, attention_bias=True, mlp_bias=True, **sizes)
            LlamaForCausalLM(config).save_pretrained(folder)
        quantize, dtype = KINDS[kind]
        base = load_base(folder, ModelSection(quantize=quantize), Precision(dtype, "no"), CPU)
        torch.manual_seed(1)
        return attach_adapter(base, AdapterSection(rank=4, alpha=8, **adapter), folder)

    return make


def train(model, steps=3, checkpointing=True, reentrant=False):
    """Train some steps with an evaluation after each; return all losses, and the trained weights."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), 1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses += [float(loss), float(model.eval()(input_ids=TOKENS, labels=TOKENS).loss)]
    return losses, {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert len(set(expected[0])) > 2  # it learns
    assert not [name for name in expected[1] if not torch.equal(found[1][name], expected[1][name])]


@pytest.mark.parametrize(("layers", "kind"), [*((3, kind) for kind in KINDS), (1, "nf4"), (2, "nf4"), (4, "nf4")])
def test_training_has_the_bits_of_a_whole_base(make_model, layers, kind):
    expected = train(make_model(layers, kind))
    model = make_model(layers, kind)
    stream_layers(model, CPU)
    assert_same(train(model), expected)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ({}, {"checkpointing": False}),
        ({}, {"reentrant": True}),
        ({"targets": ("q_proj",)}, {}),  # the base's down_proj then runs backward before anything is computed once more
        ({"layers": (1,)}, {}),
        ({"layers": (3,)}, {"checkpointing": False}),
        ({"dora": True}, {}),
        ({"train_tokens": (5, 9)}, {}),
    ],
    ids=str,
)
def test_every_way_to_train_has_the_bits_of_a_whole_base(make_model, adapter, options):
    expected = train(make_model(5, **adapter), **options)
    model = make_model(5, **adapter)
    stream_layers(model, CPU)
    assert_same(train(model, **options), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_begins_with_parts_of_the_base_has_changed_it_before(make_model, init):
    expected = train(make_model(3, "float32", init=init))
    model = make_model(3, "float32", init=init)
    stream_layers(model, CPU)
    assert_same(train(model), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8", "float32"])
def test_a_pass_needs_its_own_slot_only(make_model, monkeypatch, kind):
    """Whatever the other slot holds: nothing of the layer before is read any more, and nothing relies on copying ahead."""
    expected = train(make_model(5, kind))
    model = make_model(5, kind)
    stream = stream_layers(model, CPU)
    bring = stream._bring

    def poison_the_other(number, following):
        bring(number, -1)
        stream.slots[1 - number % 2].fill_(77)
        stream._held[1 - number % 2] = None

    monkeypatch.setattr(stream, "_bring", poison_the_other)
    assert_same(train(model), expected)


@pytest.mark.parametrize(
    "is_left_out", [lambda number, following: following < number, lambda number, following: following > number]
)
def test_these_tests_see_a_pass_that_finds_another_layer(make_model, monkeypatch, is_left_out):
    expected, _ = train(make_model(3))
    bring = LayerStream._bring

    def forget(stream, number, following):
        if not is_left_out(number, following):
            bring(stream, number, following)

    monkeypatch.setattr(LayerStream, "_bring", forget)
    model = make_model(3)
    stream_layers(model, CPU)
    assert train(model)[0] != expected


def test_the_next_layer_is_copied_while_one_computes(make_model, monkeypatch):
    """Layer 0 and 1 are there when a step begins, since the backward pass before it ended with them."""
    model = make_model(4)
    stream = stream_layers(model, CPU)
    train(model, steps=1)  # its evaluation leaves layer 0 and 3
    copies, copy = [], stream._copy

    def note(number):
        if stream._held[number % 2] != number:
            copies.append(number)
        copy(number)

    monkeypatch.setattr(stream, "_copy", note)
    train(model, steps=1)
    assert copies == [1, 2, 3, 1, 0, 2, 3, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_holds_two_layers(make_model, kind):
    model = make_model(5, kind)
    weights = [matrix.module.weight for layer in list_layers(model) for matrix in list_matrices(layer)]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    stream = stream_layers(model, CPU)
    assert len(weights) == 5 * 7
    assert stream.host.nbytes == size
    assert sum(slot.nbytes for slot in stream.slots) == size * 2 // 5
    assert {weight.untyped_storage().data_ptr() for weight in weights} == {slot.data_ptr() for slot in stream.slots}
    if kind == "int8":
        train(model, steps=1)
        states = [matrix.module.state.CB for layer in list_layers(model) for matrix in list_matrices(layer)]
        assert {state.untyped_storage().data_ptr() for state in states} == {slot.data_ptr() for slot in stream.slots}


@pytest.mark.parametrize("kind", ["nf4", "int8", "bfloat16"])
def test_a_state_dict_has_the_weights_of_every_layer(make_model, kind):
    """Otherwise TRL's key for reference log-probabilities that it has computed would be that of the layers in the slots."""
    expected = make_model(3, kind).state_dict()
    model = make_model(3, kind)
    stream_layers(model, CPU)
    train(model, steps=0)
    found = model.state_dict()
    assert list(found) == list(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_answers_are_those_of_a_whole_base(make_model):
    model, options = make_model(3), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 79}
    expected = model.generate(input_ids=TOKENS, **options).tolist()
    stream_layers(model, CPU)
    assert model.generate(input_ids=TOKENS, **options).tolist() == expected


def test_a_frozen_adapter_stays_on_the_device(make_model):
    model = make_model(2)
    for weight in model.parameters():
        weight.requires_grad = False
    names = [matrix.name for matrix in list_matrices(list_layers(model)[0])]
    assert len(names) == 7
    assert not [name for name in names if "lora" in name]
