"""Measure loss, perplexity and accuracy on the trained tokens of held-out rows."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm

from finetune.data.dataset import load_splits
from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.settings import DataSettings, Source
from finetune.errors import describe_count
from finetune.models.opening import LoadedModel, open_model

logger = logging.getLogger(__name__)

# Logits are made for so many positions at a time: 256 x 99,000 float32 numbers are 100 MB.
_CHUNK_POSITIONS = 256


@dataclass(frozen=True)
class Scores:
    """Means over all trained tokens; `loss` in nats per token."""

    loss: float
    perplexity: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class RowSums:
    """Sums over the trained tokens of one row; `loss` in nats."""

    loss: float
    correct: int
    tokens: int


def evaluate_path(name: str, files: Sequence[Path], max_tokens: int) -> Scores:
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
    return evaluate_rows(loaded, shown)


def evaluate_rows(loaded: LoadedModel, rows: Iterable[Mapping[str, list[int]]]) -> Scores:
    """Evaluate on tokenized rows (`input_ids`, `labels`), one at a time."""
    loss, correct, tokens = 0.0, 0, 0
    for sums in measure_each(loaded, rows):
        loss, correct, tokens = loss + sums.loss, correct + sums.correct, tokens + sums.tokens
    mean = loss / tokens
    return Scores(mean, math.exp(min(mean, 700.0)), correct / tokens, tokens)


def measure_each(loaded: LoadedModel, rows: Iterable[Mapping[str, list[int]]]) -> Iterator[RowSums]:
    """Yield the sums over the trained tokens of each tokenized row (`input_ids`, `labels`)."""
    backbone, head = split_model(loaded)
    for row in rows:
        with torch.inference_mode():
            ids = torch.tensor([row["input_ids"]], device=loaded.model.device)
            labels = torch.tensor(row["labels"], device=loaded.model.device)[1:]
            chosen = labels != IGNORED_LABEL
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1][chosen]
            loss, correct = 0.0, 0
            for outputs, targets in zip(
                hidden.split(_CHUNK_POSITIONS), labels[chosen].split(_CHUNK_POSITIONS), strict=True
            ):
                logits = head(outputs).float()
                loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                correct += int((logits.argmax(-1) == targets).sum())
        yield RowSums(loss, correct, int(chosen.sum()))


def split_model(loaded: LoadedModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the backbone and the head, so that logits are made only where they are needed."""
    model = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    return model.model, model.get_output_embeddings()
