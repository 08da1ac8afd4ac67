"""Rows, logits and rounding errors of the comparison of an export."""

import types

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from finetune.exporting.comparing.outputs import cut_rows, measure_kl, run_rows
from finetune.exporting.comparing.rounding import read_with_errors
from finetune.runs.results import SampleRow
from finetune.yulan.tensors import open_tensors


def make_row(prompt, answer, start=3):
    ids = list(range(start, start + prompt + answer))
    return SampleRow(ids, [-100] * prompt + ids[prompt:])


def test_rows_are_cut_after_their_share_of_positions_and_of_tokens():
    rows = [make_row(10, 300), make_row(480, 5), make_row(5, 3), SampleRow([1, 2], [-100, -100])]
    cut = cut_rows(rows)
    # 256 positions for four rows: 64 of the first; the second does not fit into 512 tokens beside it; the last trains nothing.
    assert [len(row.input_ids) for row in cut] == [74, 8]
    assert cut[0].labels == [-100] * 10 + rows[0].input_ids[10:74]
    assert [len(row.input_ids) for row in cut_rows([make_row(700, 5)])] == [705]


def test_batches_give_the_loss_and_the_logits_of_single_rows(nano_llama):
    model = LlamaForCausalLM.from_pretrained(nano_llama).eval()
    rows = [make_row(4, 30), make_row(1, 3, start=70), make_row(9, 90, start=200)]
    alone, together = (run_rows(model, rows, batches=batches) for batches in (False, True))
    assert alone.tokens == together.tokens == 123
    assert torch.allclose(alone.logits, together.logits, atol=1e-4)
    total = 0.0
    with torch.no_grad():
        for row, tokens in zip(rows, (30, 3, 90), strict=True):
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            total += loss.item() * tokens
    assert together.loss == pytest.approx(total / 123, rel=1e-5)
    assert alone.loss == pytest.approx(together.loss, rel=1e-6)


def test_kl_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(40, 50, generator=generator) for _ in range(2))
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert measure_kl(first, second) == pytest.approx(expected, rel=1e-12)
    assert measure_kl(first, first) == 0.0


@pytest.mark.parametrize(("dtype", "digits", "smallest"), [(torch.bfloat16, 8, -125), (torch.float16, 11, -13)])
def test_random_errors_are_as_large_as_those_of_rounding(tmp_path, dtype, digits, smallest):
    """Rounding errors are spread evenly over a step, so their mean square is a twelfth of its square."""
    weights = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"changed.weight": weights, "same.weight": weights.clone(), "changed.bias": weights[0].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    merged = types.SimpleNamespace(is_rounded=lambda name: name.startswith("changed"))
    read = read_with_errors(open_tensors(tmp_path), merged)
    step = torch.ldexp(torch.ones(weights.shape), torch.frexp(weights.float()).exponent.clamp_min(smallest) - digits)
    found = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
    for name, target in found.items():
        read(name, target)
    errors = (found["changed.weight"] - weights.float()) / step
    assert errors.abs().max() <= 0.5 + 1e-3
    assert errors.square().mean().item() == pytest.approx(1 / 12, rel=0.02)
    assert errors.mean().abs().item() < 0.01
    assert torch.equal(found["same.weight"], weights.float())
    assert not torch.equal(found["changed.bias"], weights[0].float())
