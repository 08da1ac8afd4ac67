"""Measure the loss of single rows in batches; a row's loss does not depend on the rows beside it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

# Logits are made for so many positions at a time: 256 x 99,000 float32 numbers are 100 MB.
CHUNK_POSITIONS = 256


@dataclass(frozen=True)
class MarkedTokens:
    """The tokens of a row, and for each whether it is trained; both have shape `(tokens,)`."""

    token_ids: Sequence[int]
    trained: Sequence[bool]


def split_model(model: PreTrainedModel | PeftModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the backbone and the head, so that logits are made only where they are needed."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return plain.model, plain.get_output_embeddings()


def measure_losses(
    model: PreTrainedModel | PeftModel, rows: Sequence[MarkedTokens], batch_size: int
) -> Iterator[float]:
    """Yield the mean loss on the trained tokens of each row, in nats; 0 for a row without trained tokens."""
    for start in range(0, len(rows), batch_size):
        yield from _measure_batch(model, rows[start : start + batch_size])


def estimate_error(sums: Sequence[tuple[float, int]]) -> float | None:
    """Return the standard error of the mean loss a token, from the sums of groups `(loss, tokens)`; None for fewer than two groups.

    The groups, rows or batches, are taken for a random sample. Source: Cochran, Sampling Techniques, 3rd edition, section 2.11 (the
    ratio estimate), without the factor for a finite population.
    """
    groups, tokens = len(sums), sum(count for _, count in sums)
    if groups < 2 or not tokens:
        return None
    mean = sum(loss for loss, _ in sums) / tokens
    squares = sum((loss - mean * count) ** 2 for loss, count in sums)
    return math.sqrt(groups / (groups - 1) * squares) / tokens


@torch.no_grad()
def _measure_batch(model: PreTrainedModel | PeftModel, rows: Sequence[MarkedTokens]) -> list[float]:
    backbone, head = split_model(model)
    longest, device = max(len(row.token_ids) for row in rows), model.device
    # Padding on the right, behind every token that is read: causal attention never looks at it.
    ids = torch.tensor([[*row.token_ids, *[0] * (longest - len(row.token_ids))] for row in rows], device=device)
    mask = torch.tensor(
        [[1] * len(row.token_ids) + [0] * (longest - len(row.token_ids)) for row in rows], device=device
    )
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    losses = []
    for number, row in enumerate(rows):
        chosen = torch.tensor(list(row.trained)[1:], dtype=torch.bool, device=device)
        if not bool(chosen.any()):
            losses.append(0.0)
            continue
        length = len(row.token_ids)
        outputs, targets = hidden[number, : length - 1][chosen], ids[number, 1:length][chosen]
        parts = zip(outputs.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
        total = sum(
            float(torch.nn.functional.cross_entropy(head(states).float(), part, reduction="sum"))
            for states, part in parts
        )
        losses.append(total / len(targets))
    return losses
