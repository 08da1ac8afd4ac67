"""Run models over sample rows, and compare their logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.runs.results import SampleRow

_MOST_POSITIONS = 256  # 100 MB of logits where the vocabulary has 99,000 tokens
_MOST_TOKENS = 512  # a full-size model takes about 25 seconds of a CPU core for them
_BATCH_TOKENS = 2048
_LOSS_POSITIONS = 32


@dataclass(frozen=True)
class Output:
    """The output of one model: its loss over all trained tokens, and logits of some, (positions, vocabulary)."""

    loss: float
    tokens: int
    logits: torch.Tensor


def cut_rows(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Return the beginnings of rows, as far as `run_rows` keeps their logits, and only a few hundred tokens of them in all."""
    chosen: list[SampleRow] = []
    tokens, share = 0, _find_share(rows)
    for row in rows:
        if positions := _list_trained(row)[:share]:
            end = positions[-1] + 2  # with the token that the last one predicts
            if not chosen or tokens + end <= _MOST_TOKENS:
                chosen.append(SampleRow(row.input_ids[:end], row.labels[:end]))
                tokens += end
    return chosen


def run_rows(model: Any, rows: Sequence[SampleRow], *, batches: bool = True) -> Output:
    """Run a model over rows, on the model's device, several at a time or each alone.

    A batch is padded at the end without a mask: no token of a causal model sees what comes after it.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    head, share = core.get_output_embeddings(), _find_share(rows)
    states, targets, is_kept = [], [], list[bool]()
    with torch.inference_mode():
        for batch in _make_batches(rows, _BATCH_TOKENS if batches else 0):
            ids = pad_sequence([torch.tensor(row.input_ids) for row in batch], batch_first=True)
            hidden = core.model(input_ids=ids.to(core.device), use_cache=False).last_hidden_state
            for row, state in zip(batch, hidden, strict=True):
                positions = _list_trained(row)
                states.append(state[positions])
                targets += [row.labels[position + 1] for position in positions]
                is_kept += [number < share for number in range(len(positions))]
        total, kept = 0.0, []
        parts = (torch.cat(states), torch.tensor(targets), torch.tensor(is_kept))
        for chunk, labels, chosen in zip(*(part.split(_MOST_POSITIONS) for part in parts), strict=True):
            logits = head(chunk).float().cpu()
            total += _sum_losses(logits, labels)
            kept.append(logits if chosen.all() else logits[chosen])
    return Output(total / len(targets), len(targets), kept[0] if len(kept) == 1 else torch.cat(kept))


def measure_kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL(expected || found) in nats, computed in float64 a few rows at a time."""
    total = 0.0
    for first, second in zip(expected.split(_LOSS_POSITIONS), found.split(_LOSS_POSITIONS), strict=True):
        log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(0.0, total / expected.shape[0])


def measure_agreement(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the share of positions with the same likeliest token."""
    return (expected.argmax(-1) == found.argmax(-1)).double().mean().item()


def measure_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference of a logit."""
    pairs = zip(expected.split(_LOSS_POSITIONS), found.split(_LOSS_POSITIONS), strict=True)
    return max(float((first - second).abs().max()) for first, second in pairs)


def _sum_losses(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the sum of the cross entropies in nats; all at once would take the memory of the logits again."""
    pairs = zip(logits.split(_LOSS_POSITIONS), labels.split(_LOSS_POSITIONS), strict=True)
    return sum(torch.nn.functional.cross_entropy(*pair, reduction="sum").item() for pair in pairs)


def _find_share(rows: Sequence[SampleRow]) -> int:
    """Return the number of positions of a row whose logits are kept."""
    return max(1, _MOST_POSITIONS // len(rows))


def _list_trained(row: SampleRow) -> list[int]:
    """Return the positions that predict a trained token."""
    return [position for position, label in enumerate(row.labels[1:]) if label != IGNORED_LABEL]


def _make_batches(rows: Sequence[SampleRow], limit: int) -> Iterator[list[SampleRow]]:
    batch: list[SampleRow] = []
    for row in rows:
        longest = max(len(one.input_ids) for one in (*batch, row))
        if batch and longest * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    yield batch
