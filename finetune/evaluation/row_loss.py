"""Measure the loss of single rows in batches; a row's loss does not depend on the rows beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune.evaluation.token_loss import split_model
from finetune.models.opening import LoadedModel


@dataclass(frozen=True)
class MarkedTokens:
    """The tokens of a row, and for each whether it is trained; both have shape `(tokens,)`."""

    token_ids: Sequence[int]
    trained: Sequence[bool]


def measure_losses(loaded: LoadedModel, rows: Sequence[MarkedTokens], batch_size: int) -> Iterator[float]:
    """Yield the mean loss on the trained tokens of each row, in nats; 0 for a row without trained tokens."""
    for start in range(0, len(rows), batch_size):
        yield from _measure_batch(loaded, rows[start : start + batch_size])


def _measure_batch(loaded: LoadedModel, rows: Sequence[MarkedTokens]) -> Iterator[float]:
    backbone, head = split_model(loaded)
    longest, device = max(len(row.token_ids) for row in rows), loaded.model.device
    # Padding on the right, behind every token that is read: causal attention never looks at it.
    ids = torch.tensor([[*row.token_ids, *[0] * (longest - len(row.token_ids))] for row in rows], device=device)
    mask = torch.tensor(
        [[1] * len(row.token_ids) + [0] * (longest - len(row.token_ids)) for row in rows], device=device
    )
    with torch.inference_mode():
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for number, row in enumerate(rows):
            chosen = torch.tensor(list(row.trained)[1:], dtype=torch.bool, device=device)
            if not bool(chosen.any()):
                yield 0.0
                continue
            length = len(row.token_ids)
            logits = head(hidden[number, : length - 1][chosen]).float()
            yield float(torch.nn.functional.cross_entropy(logits, ids[number, 1:length][chosen]))
