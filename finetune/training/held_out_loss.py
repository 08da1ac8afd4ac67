"""Make a trainer's held-out loss the mean over all trained tokens, or all rows of a preference method, whatever its batches are.

transformers averages the means of batches, so that a token of a batch with few trained tokens counts more, and counts rows twice
that fill up the last batch of several processes (transformers 5.23, `Trainer.evaluation_loop`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.models.row_loss import estimate_error
from finetune.recipe.methods import Method


def average_over_tokens(trainer_class: type[Any]) -> type[Any]:
    """Return a trainer class whose evaluations report the mean loss over trained tokens; its batches have `labels`."""
    return type(trainer_class.__name__, (_TokenMean, trainer_class), {})


def average_over_rows(trainer_class: type[Any], method: Method) -> type[Any]:
    """Return a trainer class whose evaluations report the mean loss over pairs or labelled answers."""
    return type(trainer_class.__name__, (_RowMean, trainer_class), {"method": method})


class _HeldOutMean:
    """Overrides three methods of `transformers.Trainer`, and must stand before it among the bases of a class."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._sums: list[tuple[float, int]] = []
        super().__init__(*arguments, **options)

    def get_eval_dataloader(self: Any, *arguments: Any, **options: Any) -> DataLoader[Any]:
        """Return batches of all held-out rows: `dataloader_drop_last` is about training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            loader: DataLoader[Any] = super().get_eval_dataloader(*arguments, **options)  # type: ignore[misc]
        finally:
            self.args.dataloader_drop_last = drops
        return loader

    def prediction_step(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Compute the loss of a batch, and add it to the sum over the batches of this process."""
        for batch, weight in self._weigh(inputs):
            found = super().prediction_step(model, batch, *arguments, **options)  # type: ignore[misc]
            if weight:  # without any token, a loss may be 0 / 0
                self._sums.append((float(found[0]) * weight, weight))
        return found

    def evaluation_loop(
        self: Any, dataloader: Any, description: str, *arguments: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> Any:
        """Evaluate, and report the mean over the tokens or rows of all processes with its standard error, which batches give."""
        self._sums = []
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, *arguments, metric_key_prefix=metric_key_prefix, **options
        )
        sums = gather_object(self._sums)
        weight = sum(count for _, count in sums)
        output.metrics[f"{metric_key_prefix}_loss"] = sum(loss for loss, _ in sums) / max(weight, 1)
        if (error := estimate_error(sums)) is not None:
            output.metrics[f"{metric_key_prefix}_loss_stderr"] = error
        return output


class _TokenMean(_HeldOutMean):
    """Weighs a batch by its trained tokens."""

    def _weigh(self: Any, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
        size = self.args.per_device_eval_batch_size
        own = None if self.accelerator.num_processes == 1 else _count_own_rows(self.accelerator, size)
        batch = inputs if own is None else {**inputs, "labels": _mask_repeated(inputs, size, own)}
        return [(batch, int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()))]


class _RowMean(_HeldOutMean):
    """Weighs a batch by its rows, and gives the model one row at a time where a mean over the batch is not the mean of its rows."""

    method: Method

    def _weigh(self: Any, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
        size = self.args.per_device_eval_batch_size
        own = _count_own_rows(self.accelerator, size)
        compares_rows = self.method.smallest_batch > 1
        has_others = own is not None and self.accelerator.num_processes > 1
        if compares_rows or not (has_others or has_token_mean(self.method, self.args)):
            return [(inputs, size if own is None else own)]
        # In the last step of several processes each of them has `size` rows, so that all call the model equally often.
        rows = size if own is None or has_others else own
        return [(_choose_row(inputs, row, rows), int(own is None or row < own)) for row in range(rows)]


def has_token_mean(method: Method, options: Any) -> bool:
    """Tell whether a part of the loss is a mean over the tokens of a batch, so that long rows count more in it."""
    losses = getattr(options, "loss_type", None)
    chosen = losses if isinstance(losses, list) else [losses]
    return method.has_token_mean or not method.token_mean_losses.isdisjoint(chosen)


def _choose_row(inputs: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    """Return one row of a batch; where both sides of its pairs stand in one tensor, the chosen ones come first."""
    return {
        name: value[row::rows] if isinstance(value, torch.Tensor | list) else value for name, value in inputs.items()
    }


def _count_own_rows(accelerator: Any, size: int) -> int | None:
    """Return how many rows of the last batch are not those by which accelerate fills it up for several processes; None for all.

    In one process it is the number of rows of the last batch, where that is smaller.

    Source: accelerate 1.15, `BatchSamplerShard`; the rows of the last step are numbered process by process.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return None
    return min(max(0, int(state.remainder) - int(accelerator.process_index) * size), size)


def _mask_repeated(inputs: Mapping[str, Any], size: int, own: int) -> torch.Tensor:
    """Return the labels of a batch without those of repeated rows."""
    labels: torch.Tensor = inputs["labels"].clone()
    if len(labels) == size or not own:
        labels[own:] = IGNORED_LABEL
    else:  # the rows stand one behind the other; where they were packed before, their ends are not known
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
        if len(starts) == size and own < size:
            labels[:, int(starts[own]) :] = IGNORED_LABEL
    return labels
