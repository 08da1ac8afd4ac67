"""The optimizer against DeepSpeed's numbers in plain torch, its groups against the rule, its other forms of moments."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from finetune.recipe.sections import OptimizerSection
from finetune.training.pretraining.moments import get_moments
from finetune.training.pretraining.optimizer import OptimizerFactory, make_groups
from finetune.training.pretraining.schedule import compute_decay
from finetune.training.pretraining.state_loading import StatesLoader, list_named_parameters
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.native.modeling import YuLanMiniForCausalLM, load_native
from finetune.yulan.states.optimizer_states import open_states


@pytest.fixture
def continue_case(shared):
    """Return a function that takes five steps from a case's states in plain torch, and gives the losses and the optimizer."""
    root = shared / "reference" / "universal"
    batches = load_file(root / "batches.safetensors")["input_ids"]

    def go_on(case, schedule, moments="float32", change=None):
        model = load_native(
            root / case,
            dtype=torch.float32 if case == "case_fp32" else torch.bfloat16,
            attn_implementation="eager",
        )
        states = open_states(root / case)
        optimizer = OptimizerFactory(states.groups, moments).make(model)
        StatesLoader(states).on_train_begin(None, TrainerState(), None, model=model, optimizer=optimizer)
        if change is not None:
            change(optimizer)
        losses = []
        for step in range(11, 16):
            factor = compute_decay("1-sqrt", step - 1, 10, 30) if schedule == "1sqrt" else 1.0
            for group in optimizer.param_groups:
                group["initial_lr"] = group.get("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * factor
            ids = batches[step - 1].long()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
            losses.append(loss.item())
        return losses, optimizer

    return go_on


@pytest.fixture
def expected(shared):
    return json.loads((shared / "reference" / "universal" / "expected.json").read_text())


@pytest.mark.parametrize("case", ["case", "case_fp32"])
@pytest.mark.parametrize("schedule", ["stable", "1sqrt"])
def test_plain_torch_goes_on_as_deepspeed_did(continue_case, expected, shared, case, schedule):
    losses, optimizer = continue_case(case, schedule)
    rows = expected["cases"][case]["after_resume"][schedule]
    tolerance = expected["tolerance"]["case_fp32" if case == "case_fp32" else f"case_{schedule}"]
    assert losses == pytest.approx([row["loss"] for row in rows], abs=tolerance)
    if (case, schedule) == ("case_fp32", "stable"):
        final = load_file(shared / "reference" / "universal" / "expected_final_case_fp32.safetensors")
        for name, parameter in list_named_parameters(optimizer):
            first, second, step = get_moments(optimizer, parameter)
            assert step == 15
            for part, tensor in (("fp32", parameter), ("exp_avg", first), ("exp_avg_sq", second)):
                wanted = final[f"{part}/{name}"].reshape(tensor.shape)
                assert torch.allclose(tensor, wanted, rtol=0, atol=1e-5), (part, name)


def set_in_groups(**values):
    def change(optimizer):
        for group in optimizer.param_groups:
            group.update(values)

    return change


def forget_steps(optimizer):
    for state in optimizer.state.values():
        state["step"].zero_()


@pytest.mark.parametrize(
    ("mistake", "change"),
    [
        ("eps_1e-8", set_in_groups(eps=1e-8)),
        ("beta2_0.999", set_in_groups(betas=(0.9, 0.999))),
        ("wd_zero", set_in_groups(weight_decay=0.0)),
        ("wd_everywhere", set_in_groups(weight_decay=0.1)),
        ("step_zero", forget_steps),
    ],
)
def test_mistakes_are_what_the_reference_says_they_are(continue_case, expected, mistake, change):
    losses, _ = continue_case("case_fp32", "stable", change=change)
    wrong = expected["cases"]["case_fp32"]["wrong_on_purpose"][mistake]
    assert losses == pytest.approx(wrong["losses"], abs=2e-5)
    right = [row["loss"] for row in expected["cases"]["case_fp32"]["after_resume"]["stable"]]
    assert losses != pytest.approx(right, abs=expected["tolerance"]["case_fp32"])


@pytest.mark.parametrize("case", ["case", "case_fp32"])
def test_moments_elsewhere_are_the_same_and_in_8_bits_nearly(continue_case, case):
    whole, _ = continue_case(case, "stable")
    assert continue_case(case, "stable", "cpu")[0] == whole
    quantized, optimizer = continue_case(case, "stable", "8bit")
    assert quantized[0] == whole[0]
    assert quantized == pytest.approx(whole, abs=2e-2)
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())


def test_the_groups_of_a_fresh_start_are_those_of_the_reference(shared, expected):
    """By rule: matrices at lr * 256 / hidden (the case's own base width is 12.8), and no decay of biases, norms, alphas."""
    model = load_native(shared / "reference" / "universal" / "case", dtype=torch.float32)
    groups = make_groups(model, OptimizerSection())
    wanted = expected["cases"]["case"]["groups"]
    assert [(group.lr, group.weight_decay, set(group.names)) for group in groups] == [
        (pytest.approx(group["lr"]), group["weight_decay"], set(group["params"])) for group in wanted
    ]
    assert {(group.betas, group.eps) for group in groups} == {((0.9, 0.95), 1e-15)}


def test_matrices_learn_at_the_published_width():
    config = YuLanMiniConfig(
        hidden_size=384, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6, vocab_size=8
    )
    groups = make_groups(YuLanMiniForCausalLM(config), OptimizerSection(learning_rate=3e-3, weight_decay=0.2))
    assert [(group.lr, group.weight_decay) for group in groups] == [
        (pytest.approx(3e-3 * 256 / 384), 0.2),
        (3e-3, 0.2),
        (3e-3, 0.0),
    ]
