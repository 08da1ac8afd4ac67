"""The fused loss against the loss of whole logits: values, gradients, and how few logits it holds."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.yulan.native import native_loss as losses
from finetune.yulan.native.native_loss import ZTerms, compute_fused_loss, compute_loss
from tests.yulan.native.test_modeling import make_ids, make_model

TOKENS, WIDTH, VOCABULARY = 2 * 333, 24, 1000
Z_LOSS = 1e-2


def make_case(dtype=torch.float32):
    """Return states, a head and labels of which some are not trained, in numbers as large as real ones."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(2, TOKENS // 2, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (2, TOKENS // 2), generator=generator)
    labels[0, :100] = labels[1, 7] = -100
    return states.requires_grad_(), weight.requires_grad_(), labels


def run(compute, dtype=torch.float32, scale=1.0, **options):
    """Return a loss and the gradients of states and head."""
    states, weight, labels = make_case(dtype)
    given = (states, weight) if compute is compute_fused_loss else (functional.linear(states, weight),)
    loss = compute(*given, labels, Z_LOSS, **options)
    (scale * loss).backward()
    return loss.detach(), states.grad, weight.grad


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 77}, {"num_items_in_batch": torch.tensor(77)}])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_fused_is_the_loss_of_whole_logits(options, scale):
    for found, expected in zip(
        run(compute_fused_loss, torch.float64, scale, **options),
        run(compute_loss, torch.float64, scale, **options),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_z_terms_of_trained_tokens_are_added_up(monkeypatch):
    """Over several chunks and two batches, the mean is what the z term adds to the loss."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 50)
    states, weight, labels = make_case(torch.float64)
    terms = ZTerms()
    for _ in range(2):
        compute_fused_loss(states, weight, labels, Z_LOSS, num_items_in_batch=7, z_terms=terms)
    logits = functional.linear(states, weight)
    expected = compute_loss(logits, labels, Z_LOSS) - compute_loss(logits, labels, 0.0)
    assert terms.take_mean() == pytest.approx(expected.item(), rel=1e-12)
    assert terms.take_mean() is None


def test_labels_that_are_shifted_already():
    states, weight, labels = make_case()
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert compute_fused_loss(states, weight, labels, Z_LOSS) == compute_fused_loss(
        states, weight, None, Z_LOSS, shift_labels=shifted
    )


def test_in_bfloat16_nothing_is_rounded_more_than_with_whole_logits():
    exact = run(compute_loss, torch.float64)
    fused, whole = run(compute_fused_loss, torch.bfloat16), run(compute_loss, torch.bfloat16)
    assert fused[0].dtype == torch.float32
    assert fused[0].item() == pytest.approx(whole[0].item(), rel=1e-6)
    for found, other, expected in zip(fused[1:], whole[1:], exact[1:], strict=True):
        assert found.dtype == torch.bfloat16
        error, usual = (found.double() - expected).norm(), (other.double() - expected).norm()
        assert error <= 1.01 * usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_several_blocks_of_rows_gets_one_gradient(monkeypatch, dtype):
    whole = run(compute_fused_loss, dtype)
    monkeypatch.setattr(losses, "_HEAD_ROWS", 300)
    torch.testing.assert_close(run(compute_fused_loss, dtype)[2], whole[2])


def test_autocast_multiplies_in_bfloat16():
    states, weight, labels = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_fused_loss(states, weight, labels, Z_LOSS)
        whole = compute_loss(functional.linear(states, weight), labels, Z_LOSS)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert states.grad.dtype == weight.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remember the most numbers that one tensor had."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numbers = max(self.numbers, output.numel())
        return output


def test_only_a_chunk_of_logits_ever_exists(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 50)
    with Largest() as largest:
        run(compute_fused_loss)
    assert largest.numbers == 50 * VOCABULARY


def test_a_frozen_head_and_an_evaluation_compute_what_they_need():
    states, weight, labels = make_case()
    expected = compute_loss(functional.linear(states, weight), labels, Z_LOSS).item()
    with torch.no_grad():
        assert compute_fused_loss(states, weight, labels, Z_LOSS).item() == pytest.approx(expected, rel=1e-6)
    weight.requires_grad_(False)
    compute_fused_loss(states, weight, labels, Z_LOSS).backward()
    torch.testing.assert_close(states.grad, run(compute_loss)[1])
    assert weight.grad is None


def test_a_second_backward_is_refused():
    states, weight, labels = make_case()
    loss = compute_fused_loss(states, weight, labels, Z_LOSS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward pass"):
        loss.backward()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_leaves_logits_out_when_asked(tied):
    model, ids = make_model(tie_word_embeddings=tied).train(), make_ids()
    whole = model(ids, labels=ids)
    whole.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    fused = model(ids, labels=ids, skip_logits=True)
    fused.loss.backward()
    assert fused.logits is None and whole.logits is not None
    assert fused.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-7, msg=name)
    model.skips_logits = True
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None and model(ids, labels=ids, skip_logits=False).logits is not None
