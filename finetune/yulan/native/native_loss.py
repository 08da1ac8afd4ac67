"""The pre-training loss, cross entropy with a z term: from logits, or from hidden states without holding all logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

# The number of tokens whose logits are held together: 256 x 99,000 float32 numbers are 100 MB.
CHUNK_TOKENS = 256
# The number of head rows whose gradient is rounded together, so that the whole gradient never exists in two types.
_HEAD_ROWS = 16384


@dataclass
class ZTerms:
    """Sums up the z terms of trained tokens, so that a log can show their mean."""

    total: torch.Tensor | float = 0.0
    tokens: torch.Tensor | int = 0

    def add(self, lse: torch.Tensor, trained: torch.Tensor, z_loss: float) -> None:
        """Add the z terms of the trained ones among some tokens; both tensors are (tokens,)."""
        self.total = self.total + z_loss * (lse.detach().square() * trained).sum()
        self.tokens = self.tokens + trained.sum()

    def take_mean(self) -> float | None:
        """Return the mean in nats a token, and begin anew; None where no token was added."""
        total, tokens = float(self.total), int(self.tokens)
        self.total, self.tokens = 0.0, 0
        return total / tokens if tokens else None


def compute_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> torch.Tensor:
    """Return the mean over the trained tokens of `lse - logit + z_loss * lse**2`, where lse is the logsumexp of the logits.

    With `num_items_in_batch` the sum is divided by that number instead; the Trainer passes it for gradient accumulation.
    Logits are (rows, tokens, vocabulary). `labels` are shifted here; `shift_labels` are shifted already.
    Source: `lse_square_scale` of Liger's fused cross entropy, which pretrain/modeling_yulanmini.py trains with.
    """
    targets = _shift(labels, shift_labels, ignore_index).to(logits.device)
    wide = logits.reshape(len(targets), -1).to(torch.promote_types(logits.dtype, torch.float32))
    total = functional.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    trained = targets != ignore_index
    if z_loss:
        total = total + z_loss * (torch.logsumexp(wide, dim=-1).square() * trained).sum()
    return total / (trained.sum() if num_items_in_batch is None else num_items_in_batch)


def compute_fused_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    z_terms: ZTerms | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return `compute_loss` of the logits `states @ weight.T`, holding the logits of only `CHUNK_TOKENS` tokens at a time.

    `states` are hidden states, (rows, tokens, width). The gradients are computed together with the loss, so that no logits are
    computed twice. The z terms of the tokens are added to `z_terms`.
    Source: fused linear cross entropy of Liger (arXiv 2410.10989), section 3.2.
    """
    targets = _shift(labels, shift_labels, ignore_index).to(states.device)
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    divisor = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    divisor = torch.as_tensor(divisor, device=states.device)
    loss: torch.Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        states.reshape(len(targets), -1),
        weight,
        targets,
        divisor,
        z_loss,
        ignore_index,
        torch.is_grad_enabled(),
        z_terms,
    )
    return loss


def _shift(labels: torch.Tensor, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


class _FusedLoss(torch.autograd.Function):
    """Compute the loss and its gradients chunk by chunk, and free the logits of each chunk before the next."""

    @staticmethod
    def forward(
        context: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        divisor: torch.Tensor,
        z_loss: float,
        ignore_index: int,
        is_differentiated: bool,
        z_terms: ZTerms | None,
    ) -> torch.Tensor:
        """Return the loss, and keep both gradients for the backward pass."""
        sums_dtype = torch.promote_types(states.dtype, torch.float32)
        loss = torch.zeros((), dtype=sums_dtype, device=states.device)
        needs_states, needs_weight = (is_differentiated and needed for needed in context.needs_input_grad[:2])
        state_gradient = torch.empty_like(states) if needs_states else None
        weight_sums = _make_sums(weight, sums_dtype) if needs_weight else []
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), CHUNK_TOKENS):
                span = slice(start, start + CHUNK_TOKENS)
                logits = functional.linear(states[span], weight).to(sums_dtype)
                part, lse = _turn_into_gradient(logits, targets[span], divisor, z_loss, ignore_index)
                loss += part
                if z_terms is not None:
                    z_terms.add(lse, targets[span] != ignore_index, z_loss)
                gradient = logits.to(states.dtype)
                del logits
                if state_gradient is not None:
                    torch.mm(gradient, weight, out=state_gradient[span])
                for sums, columns in zip(weight_sums, gradient.split(_HEAD_ROWS, dim=1), strict=needs_weight):
                    add_product(sums, columns.t(), states[span])
                del gradient
        context.gradients = (state_gradient, _join_sums(weight_sums, weight) if needs_weight else None)
        return loss

    @staticmethod
    def backward(context: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients that `forward` computed, scaled in place. This works once for each forward pass."""
        if context.gradients is None:
            raise RuntimeError(
                "the fused loss keeps its gradients for one backward pass; call forward again before another"
            )
        gradients, context.gradients = context.gradients, None
        return (*(None if gradient is None else gradient.mul_(scale) for gradient in gradients), *(None,) * 6)


def _make_sums(weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return zeros for the head's gradient, in blocks of rows; they are views of one tensor if no rounding follows."""
    if weight.dtype == dtype:
        return list(torch.zeros_like(weight).split(_HEAD_ROWS))
    return [torch.zeros_like(rows, dtype=dtype) for rows in weight.split(_HEAD_ROWS)]


def _join_sums(sums: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return the blocks as one gradient of the head's type; each block is freed once it is rounded."""
    if sums[0].dtype == weight.dtype:
        return sums[0].as_strided(weight.shape, weight.stride())
    return torch.cat([sums.pop(0).to(weight.dtype) for _ in range(len(sums))])


def _turn_into_gradient(
    logits: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor, z_loss: float, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a chunk of logits, (tokens, vocabulary), and its logsumexps; replace the logits in place with its gradient.

    The gradient of a token's loss is `softmax * (1 + 2 * z_loss * lse)`, less 1 at the target.
    """
    trained = targets != ignore_index
    places = targets.where(trained, 0).unsqueeze(-1)
    chosen = logits.gather(-1, places).squeeze(-1)
    largest = logits.amax(-1)
    sums = logits.sub_(largest.unsqueeze(-1)).exp_().sum(-1)
    above = sums.log()
    lse = largest + above
    losses = (largest - chosen) + above + z_loss * lse.square()
    shares = (1 + 2 * z_loss * lse) / (sums * divisor)
    logits.mul_(shares.where(trained, 0).unsqueeze(-1))
    logits.scatter_add_(-1, places, (-trained.to(logits.dtype) / divisor).unsqueeze(-1))
    return losses.where(trained, 0).sum() / divisor, lse


def add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `sums`, whose type may be wider, without rounding the product to the narrower type first."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    elif sums.device.type == "cuda":
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype))
