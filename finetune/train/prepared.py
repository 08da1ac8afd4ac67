"""Hand rows that are tokens already to TRL's trainers, which would otherwise render and tokenize texts themselves.

SFT and reward trainers take such rows as they are. The others of TRL 1.16 prepare whatever they are given, DPO and KTO in a
method of their own, so that method is left out.
"""

from typing import Any

from datasets import Dataset
from transformers import Trainer


def accept_prepared_rows(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return TRL's trainer class without its own preparation of rows."""

    def keep(self: Trainer, dataset: Dataset, *arguments: Any, **options: Any) -> Dataset:
        return dataset

    return type(trainer_class.__name__, (trainer_class,), {"_prepare_dataset": keep})
