"""Hand rows that are tokens already to TRL's trainers, which would otherwise render and tokenize texts themselves.

SFT and reward trainers take such rows as they are. The others of TRL 1.16 prepare whatever they are given: DPO and KTO in a
method of their own, ORPO and CPO by `map` within their constructors. Both are left out here, and what these trainers make of
a row is made when a batch is collected, from `prompt_ids`, `chosen_ids`, `rejected_ids` or `completion_ids`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.recipe.methods import Method

Row = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class PreparedRows(Dataset):
    """Rows of which nothing is left to prepare: whatever would be mapped over them is done."""

    def map(self, *arguments: Any, **options: Any) -> "PreparedRows":
        """Return the rows as they are."""
        return self


def accept_prepared_rows(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return TRL's trainer class without its own preparation of rows."""

    def keep(self: Trainer, dataset: Dataset, *arguments: Any, **options: Any) -> Dataset:
        return dataset

    return type(trainer_class.__name__, (trainer_class,), {"_prepare_dataset": keep})


def choose_rows(rows: Dataset, method: Method, seed: int) -> Dataset:
    """Return the columns that a method's trainer is given; in an order of the seed where it reads them one after the other."""
    chosen = rows.select_columns(list(method.columns))
    if method.name == "kto":
        chosen = chosen.shuffle(seed=seed)
    if method.name not in _MAPPED:
        return chosen
    return PreparedRows(chosen.data, info=chosen.info, indices_table=chosen._indices, fingerprint=chosen._fingerprint)


def make_kto_collator(method: Method, pad_token: int) -> Collate:
    """Return TRL's collator for labelled answers, with a mismatched answer added to each row."""
    collator = importlib.import_module(method.trainer_module).DataCollatorForUnpairedPreference
    return adapt_collator(method, collator(pad_token_id=pad_token))


def adapt_collator(method: Method, collate: Collate) -> Collate:
    """Return a collator that gives TRL's own the columns that it reads."""
    adapt = _ADAPT.get(method.name)
    return collate if adapt is None else lambda rows: collate(adapt(rows))


def _join_prompts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{name: [*row["prompt_ids"], *row[name]] for name in ("chosen_ids", "rejected_ids")} for row in rows]


def _write_out_sides(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what ORPO and CPO read of both sides: the whole text, and labels for the answer alone."""
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
    """Add to each row the answer of its neighbour in the batch, by which KTO estimates how far the model has moved.

    Source: KTO (arXiv 2402.01306), section 4.1; TRL 1.16 rotates by one, too.
    """
    answers = [row["completion_ids"] for row in rows]
    return [{**row, "KL_completion_ids": answers[number - 1]} for number, row in enumerate(rows)]


# Those whose constructors map over the rows.
_MAPPED = ("orpo", "cpo", "simpo")
_ADAPT: Mapping[str, Callable[[Sequence[Row]], list[dict[str, Any]]]] = {
    "kto": _add_mismatched_answers,
    "orpo": _write_out_sides,
    "cpo": _write_out_sides,
    "simpo": _write_out_sides,
    "reward": _join_prompts,
}
