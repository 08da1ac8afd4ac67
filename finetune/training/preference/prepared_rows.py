"""Give TRL's preference trainers rows that are tokens already, instead of texts to render and tokenize.

The SFT and reward trainers of TRL 1.16 accept such rows. The others prepare any rows: DPO and KTO in a method of their own, ORPO
and CPO by `map` in their constructors. The kit disables both. The collator makes the columns that these trainers read, from
`prompt_ids`, `chosen_ids`, `rejected_ids` or `completion_ids`.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from finetune.compat import copy_rows
from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.errors import TrainingError
from finetune.recipe.methods import Method, RowAdapter

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class PreparedRows(Dataset):
    """Rows that need no preparation, whose `map` does nothing; the constructors of ORPO and CPO call it."""

    def map(self, *arguments: Any, **options: Any) -> "PreparedRows":
        """Return the rows unchanged."""
        return self


def choose_rows(rows: Dataset, method: Method, seed: int) -> Dataset:
    """Return the rows with the columns that the method's trainer reads, shuffled once by the seed where the trainer does not shuffle."""
    chosen = rows.select_columns(list(method.columns))
    if method.shuffles_once:
        chosen = chosen.shuffle(seed=seed)
    return copy_rows(PreparedRows, chosen) if method.maps_rows else chosen


def leave_out_lone_row(rows: Dataset, method: Method, batch: int, use: str) -> Dataset:
    """Return the rows without the last one, where it would be alone in the last batch and so be compared with itself.

    `batch` is the number of rows in a batch, `use` what the rows are for.

    Raises:
        TrainingError: there is only one row.
    """
    if method.adapt_rows != "add_mismatched_answers" or len(rows) % batch != 1:
        return rows
    if len(rows) == 1:
        raise TrainingError(
            f"{method.name} compares each answer with another row's, and there is one row for {use}; add rows"
        )
    logger.info(
        "1 of %s rows for %s is left out: %s compares the answers of a batch of %d, and this row would be alone in the last one",
        f"{len(rows):,}",
        use,
        method.name,
        batch,
    )
    return rows.select(range(len(rows) - 1))


def make_collator(method: Method, pad_token: int) -> Collate | None:
    """Make the collator that a trainer's constructor must be given, or return None where it makes its own."""
    if not method.collator_class:
        return None
    collator = getattr(importlib.import_module(method.trainer_module), method.collator_class)
    return adapt_collator(method, collator(pad_token_id=pad_token))


def adapt_collator(method: Method, collate: Collate) -> Collate:
    """Return a collator that first makes the columns that TRL's own collator reads."""
    adapt = _ADAPTERS[method.adapt_rows]
    return collate if adapt is None else lambda rows: collate(adapt(rows))


def _join_prompts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{name: [*row["prompt_ids"], *row[name]] for name in ("chosen_ids", "rejected_ids")} for row in rows]


def _write_out_sides(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the columns that ORPO and CPO read for both sides: the whole text, and labels on the answer only."""
    written: list[dict[str, Any]] = []
    for row in rows:
        features: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            features[f"{side}_input_ids"] = [*prompt, *answer]
            features[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            features[f"{side}_labels"] = [IGNORED_LABEL] * len(prompt) + list(answer)
        written.append(features)
    return written


def _add_mismatched_answers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Add to each row the answer of its neighbour in the batch, from which KTO estimates its KL divergence.

    Source: KTO (arXiv 2402.01306), section 4.1; TRL 1.16 takes the neighbour, too.
    """
    answers = [row["completion_ids"] for row in rows]
    return [{**row, "KL_completion_ids": answers[number - 1]} for number, row in enumerate(rows)]


_ADAPTERS: Mapping[RowAdapter, Callable[[Sequence[Row]], list[dict[str, Any]]] | None] = {
    "none": None,
    "join_prompts": _join_prompts,
    "write_out_sides": _write_out_sides,
    "add_mismatched_answers": _add_mismatched_answers,
}
