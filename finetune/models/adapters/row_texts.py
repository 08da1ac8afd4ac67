"""Take texts of a run's own training rows, for adapters that begin with what these texts are to the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from datasets import Dataset

from finetune.data.encoding.gates import IGNORED_LABEL

# The ids of prompt and answer, where a row holds them apart. The first one that a row has is taken.
_ANSWERS = ("chosen_ids", "completion_ids")


@dataclass(frozen=True)
class Text:
    """The token ids of a text, and for each of them whether it is trained."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class RowTexts:
    """Training rows as tokens, and the seed that draws their order."""

    rows: Dataset
    seed: int

    def __iter__(self) -> Iterator[Text]:
        """Yield each text; a prompt without an answer counts as trained."""
        order = list(range(len(self.rows)))
        Random(self.seed).shuffle(order)
        for index in order:
            row = self.rows[index]
            answer = next((row[name] for name in _ANSWERS if name in row), None)
            if answer is not None:
                prompt = row["prompt_ids"]
                yield Text([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
                continue
            trained = [label != IGNORED_LABEL for label in row["labels"]]
            yield Text(row["input_ids"], trained if any(trained) else [True] * len(trained))


def pad_texts(texts: Sequence[Text], device: torch.device) -> dict[str, torch.Tensor]:
    """Return texts as one batch, with `input_ids`, `attention_mask` and `labels`, each (texts, tokens)."""
    length = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED_LABEL)
    for number, text in enumerate(texts):
        end = len(text.ids)
        ids[number, :end], mask[number, :end] = torch.tensor(text.ids), 1
        labels[number, :end] = ids[number, :end].where(torch.tensor(text.trained), IGNORED_LABEL)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
