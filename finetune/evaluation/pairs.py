"""Measure how often a model prefers the chosen answer of held-out pairs, by its score or by its log-probabilities."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

from finetune.data.dataset import load_splits
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.formats.row_formats import choose_format
from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.sources import read_source
from finetune.data.settings import DataSettings, Source
from finetune.errors import describe_count
from finetune.evaluation.worst_rows import WorstRow, list_worst
from finetune.files.folders import expand_home
from finetune.models.opening import LoadedModel, open_model
from finetune.rewards.judge import Judge, open_judge
from finetune.runs.results import is_result, open_result

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairScores:
    """Means over pairs: the share whose chosen answer has the higher score, the margin of the scores, and its logistic loss.

    A reward model scores the whole text. A language model's score is the mean log-probability of the answer's tokens, so that long
    answers have no disadvantage. `worst` are the pairs of the lowest margin, as many as were asked for.
    """

    accuracy: float
    margin: float
    loss: float
    pairs: int
    measure: str
    worst: list[WorstRow] = field(default_factory=list)


def hold_pairs(files: Sequence[Path]) -> bool:
    """Tell by the first row whether data files hold preference pairs.

    Raises:
        DataError: the row cannot be read.
    """
    for _, rows in read_source(Source(files[0], split="evaluation")):
        for place, row in rows:
            return choose_format("auto", {}, require_row(row), place).row_kind == "preference"
    return False


def evaluate_pairs(name: str, files: Sequence[Path], max_tokens: int, worst: int = 0) -> PairScores:
    """Evaluate a reward model or a language model on pairs.

    Raises:
        FinetuneError: the model or the rows cannot be used.
    """
    path = expand_home(name)
    result = open_result(path) if path.is_dir() and is_result(path) else None
    model = open_judge(result) if result is not None and result.is_reward_model else open_model(name)
    rows = _load_pairs(model, model.template, files, max_tokens)
    logger.info("reading %s", describe_count(len(rows), "pair"))
    shown = tqdm(rows, unit="pair", disable=None, leave=False)  # shown in a terminal only
    if isinstance(model, Judge):
        scores = [
            model.score([[*row["prompt_ids"], *row[f"{side}_ids"]] for side in ("chosen", "rejected")]) for row in shown
        ]
        margins, measure = [chosen - rejected for chosen, rejected in scores], "score"
    else:
        margins = [_measure(model, row, "chosen_ids") - _measure(model, row, "rejected_ids") for row in shown]
        measure = "mean log-probability of the answer"
    found = _summarise(margins, measure)
    badness = [-margin for margin in margins]
    return replace(found, worst=list_worst(rows, margins, badness, worst, model.tokenizer)) if worst else found


def _load_pairs(model: LoadedModel | Judge, template: ChatTemplate, files: Sequence[Path], max_tokens: int) -> Dataset:
    settings = DataSettings(
        train=tuple(Source(file, split="evaluation") for file in files),
        shape="pair",
        max_tokens=max_tokens,
        overflow="drop",
    )
    splits = load_splits(settings, model.tokenizer, template, seed=0)
    for note in splits.report.notes:
        logger.info("%s", note)
    return splits.train


def _measure(loaded: LoadedModel, row: dict[str, list[int]], side: str) -> float:
    """Return the mean log-probability of the tokens of one answer, in nats."""
    prompt, answer = row["prompt_ids"], row[side]
    ids = torch.tensor([[*prompt, *answer]], device=loaded.model.device)
    with torch.inference_mode():
        kept = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
        logits = kept[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
    return float(chosen.mean())


def _summarise(margins: Sequence[float], measure: str) -> PairScores:
    count = len(margins)
    loss = sum(max(0.0, -margin) + math.log1p(math.exp(-abs(margin))) for margin in margins) / count
    return PairScores(sum(margin > 0 for margin in margins) / count, sum(margins) / count, loss, count, measure)
