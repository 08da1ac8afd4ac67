"""Measure loss, perplexity and accuracy on the trained tokens of held-out rows."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from finetune.data.dataset import load_splits
from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.settings import DataSettings, Source
from finetune.errors import describe_count
from finetune.evaluation.worst_rows import WorstRow, list_worst
from finetune.models.opening import LoadedModel, open_model
from finetune.models.row_loss import CHUNK_POSITIONS, estimate_error, split_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Means over all trained tokens; `loss` in nats per token, with its standard error over rows, None for a single row.

    `worst` are the rows of the highest loss, as many as were asked for.
    """

    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    stderr: float | None = None
    worst: list[WorstRow] = field(default_factory=list)


@dataclass(frozen=True)
class RowScore:
    """The sum of the losses of a row's trained tokens in nats, how many of them are the likeliest, and their number."""

    loss: float
    correct: int
    tokens: int


def evaluate_path(name: str, files: Sequence[Path], max_tokens: int, worst: int = 0) -> Scores:
    """Evaluate a run or a model on data files, with the template it was trained with.

    Raises:
        FinetuneError: the model or the rows cannot be used.
    """
    loaded = open_model(name)
    settings = DataSettings(
        train=tuple(Source(file, split="evaluation") for file in files), max_tokens=max_tokens, overflow="drop"
    )
    splits = load_splits(settings, loaded.tokenizer, loaded.template, seed=0)
    for note in splits.report.notes:
        logger.info("%s", note)
    logger.info("reading %s", describe_count(len(splits.train), "row"))
    shown = tqdm(splits.train, unit="row", disable=None, leave=False)  # shown in a terminal only
    scores = list(score_rows(loaded, shown))
    losses = [score.loss / score.tokens for score in scores]
    found = _summarise(scores)
    return replace(found, worst=list_worst(splits.train, losses, losses, worst, loaded.tokenizer)) if worst else found


def evaluate_rows(loaded: LoadedModel, rows: Iterable[Mapping[str, list[int]]]) -> Scores:
    """Evaluate on tokenized rows (`input_ids`, `labels`), one at a time."""
    return _summarise(list(score_rows(loaded, rows)))


def score_rows(loaded: LoadedModel, rows: Iterable[Mapping[str, list[int]]]) -> Iterator[RowScore]:
    """Yield the score of each tokenized row (`input_ids`, `labels`)."""
    backbone, head = split_model(loaded.model)
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=loaded.model.device)
        labels = torch.tensor(row["labels"], device=loaded.model.device)[1:]
        chosen = labels != IGNORED_LABEL
        loss, correct = 0.0, 0
        with torch.inference_mode():
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1][chosen]
            for outputs, targets in zip(
                hidden.split(CHUNK_POSITIONS), labels[chosen].split(CHUNK_POSITIONS), strict=True
            ):
                logits = head(outputs).float()
                loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                correct += int((logits.argmax(-1) == targets).sum())
        yield RowScore(loss, correct, int(chosen.sum()))


def _summarise(scores: Sequence[RowScore]) -> Scores:
    loss, tokens = sum(score.loss for score in scores), sum(score.tokens for score in scores)
    mean = loss / tokens
    error = estimate_error([(score.loss, score.tokens) for score in scores])
    correct = sum(score.correct for score in scores)
    return Scores(mean, math.exp(min(mean, 700.0)), correct / tokens, tokens, error)
