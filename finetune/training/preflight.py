"""Check before step 1 what will really be trained, and that an evaluation fits.

Every fault is an error: a run must not start that trains on nothing, never learns to stop, or dies at its first evaluation.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Subset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.packing import PackedRows
from finetune.errors import TrainingError, describe_count, describe_unknown_name
from finetune.training.journal.progress import PREFLIGHT

logger = logging.getLogger(__name__)

# What an evaluation also returns, and no checkpoint is chosen by.
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_tokens")
BatchRow = tuple[list[int], list[int]]


def check_first_batch(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]) -> None:
    """Check the first batch: it has trained tokens and a stop token, each row has one bos, and no padding is trained.

    Without `stop_tokens`, rows may lack them.

    Raises:
        TrainingError: naming the row of the batch and what is wrong with it.
    """
    batch = draw_first_batch(trainer)
    rows = list(_split_rows(batch))
    for number, (token_ids, labels) in enumerate(rows, start=1):
        where = f"first batch, row {number} of {len(rows)}"
        _check_row(where, token_ids, labels, tokenizer)
    if stop_tokens and not any(label in stop_tokens for _, labels in rows for label in labels):
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(stop_tokens)))
        raise TrainingError(
            f"first batch: no stop token ({names}) is trained in any of its {describe_count(len(rows), 'row')}, so the model would not learn to stop; "
            "look at the rows with `finetune preview`"
        )


def check_packed_batch(trainer: Trainer) -> None:
    """Check the first batch of packed rows: each trained token is its own label and has a token of its document before it.

    Raises:
        TrainingError: nothing is trained, or a label is wrong.
    """
    batch = draw_first_batch(trainer)
    ids, labels = batch["input_ids"], batch["labels"]
    is_trained = labels != IGNORED_LABEL
    if (is_trained & ((labels != ids) | (batch["position_ids"] == 0))).any():
        raise TrainingError(
            "first batch: a token is trained with another token's label, or is the first of its document, which has nothing to follow from; "
            "this is a fault of the kit: please report it"
        )


def draw_first_batch(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the first batch of the run.

    Raises:
        TrainingError: there is none, or none of its tokens is trained.
    """
    # Iterating draws random numbers, and the run must draw the same ones as without this check.
    with torch.random.fork_rng(devices=[]):
        batch: dict[str, torch.Tensor] | None = next(iter(trainer.get_train_dataloader()), None)
    if batch is None:
        size = trainer.args.per_device_train_batch_size * trainer.args.world_size
        raise TrainingError(
            f"trainer.dataloader_drop_last: {describe_count(len(trainer.train_dataset), 'row fills', 'rows fill')} no batch of {size}, so nothing would be trained; remove this "
            "key, or lower trainer.per_device_train_batch_size"
        )
    if not any((labels != IGNORED_LABEL).any() for _, _, labels in _list_texts(batch)):
        raise TrainingError("first batch: none of its tokens is trained; look at the rows with `finetune preview`")
    return batch


def _check_row(where: str, token_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    if all(label == IGNORED_LABEL for label in labels):
        raise TrainingError(
            f"{where}: none of its {describe_count(len(token_ids), 'token')} is trained; look at it with `finetune preview`"
        )
    bos = token_ids.count(tokenizer.bos_token_id)
    if tokenizer.bos_token_id is not None and (bos != 1 or token_ids[0] != tokenizer.bos_token_id):
        raise TrainingError(
            f"{where}: must begin with {tokenizer.bos_token} and contain it once; found it {bos} times; "
            "remove it from the data, or from the template"
        )
    wrong = next((i for i, label in enumerate(labels) if label not in (IGNORED_LABEL, token_ids[i])), None)
    if wrong is not None:
        raise TrainingError(f"{where}: token {wrong} is {token_ids[wrong]}, but its label is {labels[wrong]}")


def _split_rows(batch: dict[str, torch.Tensor]) -> Iterator[BatchRow]:
    """Yield token ids and labels of each row, without padding; pairs give two rows, and packs are split where positions restart."""
    for ids, mask, labels in _list_texts(batch):
        if "position_ids" in batch:
            starts = (batch["position_ids"][0].cpu() == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
                yield ids[0, start:end].tolist(), labels[0, start:end].tolist()
            continue
        for row, row_mask, row_labels in zip(ids, mask, labels, strict=True):
            length = int(row_mask.sum())
            yield row[:length].tolist(), row_labels[:length].tolist()


def _list_texts(batch: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield ids, mask and labels of a batch, each (rows, tokens), in the form of supervised training for every method."""
    if "chosen_labels" in batch:
        for side in ("chosen", "rejected"):
            ids, mask, labels = (batch[f"{side}_{name}"].cpu() for name in ("input_ids", "attention_mask", "labels"))
            yield ids, mask, labels
        return
    ids = batch["input_ids"].cpu()
    mask = batch["attention_mask"].cpu() if "attention_mask" in batch else torch.ones_like(ids)
    if "labels" in batch:
        labels = batch["labels"].cpu()
    elif "completion_mask" in batch:
        labels = ids.masked_fill(batch["completion_mask"].cpu() == 0, IGNORED_LABEL)
    else:  # a reward model reads its score at the last token of a text
        ends = torch.arange(ids.shape[1]) == mask.sum(1, keepdim=True) - 1
        labels = ids.masked_fill(~ends, IGNORED_LABEL)
    yield ids, mask, labels


def choose_longest_rows(rows: Dataset | PackedRows, args: TrainingArguments) -> Dataset | Subset[Any]:
    """Return the longest rows, as many as one evaluation step of all processes takes; packed rows are equally long."""
    size = args.per_device_eval_batch_size * args.world_size
    if isinstance(rows, PackedRows):
        return Subset(rows, range(min(size, len(rows))))
    lengths = _measure_lengths(rows)
    return rows.select(sorted(range(len(lengths)), key=lambda row: -lengths[row])[:size])


def _measure_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each row; of a pair, those of its longer side."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    answers = [rows[name] for name in rows.column_names if name.endswith("_ids") and name != "prompt_ids"]
    texts = zip(rows["prompt_ids"], *answers, strict=True)
    return [len(prompt) + max(map(len, sides)) for prompt, *sides in texts]


def _check_best_metric(args: TrainingArguments, measured: Sequence[str]) -> None:
    """Check that an evaluation measures what the best checkpoint is chosen by.

    Raises:
        TrainingError: it does not; the run would die at its first evaluation.
    """
    wanted = args.metric_for_best_model
    if wanted is None or not (args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST):
        return
    if wanted.removeprefix("eval_") not in measured:
        known = [name for name in measured if name not in _SPEEDS]
        raise TrainingError(
            f"trainer.metric_for_best_model: {wanted!r} is {describe_unknown_name(wanted.removeprefix('eval_'), known)}"
        )


class EvaluationCheck(TrainerCallback):
    """Run one evaluation step over the longest held-out rows before step 1, so that no run dies at its first evaluation.

    It is a callback because the model must be wrapped first. After an evaluation before `train()`, accelerate would take the
    model for prepared, and the processes would train without exchanging gradients (transformers 5.23, accelerate 1.15).
    """

    def __init__(self, trainer: Trainer, scores: Sequence[str] = ()) -> None:
        """Take the trainer, and the names of what its evaluations measure besides the rows."""
        self._trainer, self._scores = trainer, scores

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate one batch on every process.

        Raises:
            TrainingError: the step runs out of memory.
        """
        held = self._trainer.eval_dataset
        rows = choose_longest_rows(held, args)
        # `evaluate(rows)` would prepare the rows anew, and lose columns such as the reference model's log-probabilities.
        self._trainer.eval_dataset = rows
        # The trainer keeps the loader of workers that persist, and would evaluate these rows for the whole run.
        persists, args.dataloader_persistent_workers = args.dataloader_persistent_workers, False
        try:
            with torch.random.fork_rng(devices=[]):
                found = self._trainer.evaluate(metric_key_prefix=PREFLIGHT)
            _check_best_metric(args, [*(name.removeprefix(f"{PREFLIGHT}_") for name in found), *self._scores])
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"evaluation does not fit: a batch of the {len(rows)} longest held-out rows runs out of memory; "
                "lower trainer.per_device_eval_batch_size"
            ) from error
        finally:
            self._trainer.eval_dataset, args.dataloader_persistent_workers = held, persists
