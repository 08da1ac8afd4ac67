"""The changes that a LoRA adapter makes to base tensors, merged a few rows at a time.

The formulas are those of the papers: LoRA (arXiv 2106.09685), rank-stabilised scaling (arXiv 2312.03732), DoRA
(arXiv 2402.09353).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetune.yulan.llama_files import EMBEDDING, HEAD


@dataclass
class Change:
    """The parts of an adapter that change one base tensor: its matrices, their scale, and the tokens whose rows it replaces.

    `replacement` takes the place of the base tensor, `copy` that of its values before LoRA is added, and `bias_delta` is added to a bias.
    """

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0
    tokens: tuple[int, ...] = ()

    @property
    def own_values(self) -> torch.Tensor | None:
        """The stored values that stand for those of the base, if there are any."""
        return self.parts.get("replacement", self.parts.get("copy"))

    @property
    def is_empty(self) -> bool:
        """Whether merging changes nothing: B is zero, and nothing is replaced or added."""
        return set(self.parts) <= {"a", "b"} and not self.parts["b"].any()


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory; `changes` maps the name of a tensor of the model to its change."""

    folder: Path
    changes: Mapping[str, Change]

    @property
    def is_empty(self) -> bool:
        """Tell whether merging changes nothing."""
        return all(change.is_empty for change in self.changes.values())

    @property
    def unties(self) -> bool:
        """Tell whether the embedding and the head of a tied base differ afterwards.

        PEFT gives a tied head only the token rows of the embedding; LoRA and whole copies act on the table that they name.
        """
        embedding = self.changes.get(EMBEDDING)
        return HEAD in self.changes or (embedding is not None and set(embedding.parts) != {"token_rows"})

    def needs_whole(self, name: str) -> bool:
        """Tell whether a tensor can only be merged whole: DoRA on an embedding table needs the norms of its columns."""
        return name in self.changes and "embedding_magnitude" in self.changes[name].parts

    def find_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a merged tensor, given the base's: a table may have been enlarged."""
        own = self.changes[name].own_values if name in self.changes else None
        return shape if own is None else tuple(own.shape)

    def has_own_values(self, name: str) -> bool:
        """Tell whether the base's values of a tensor are not needed."""
        return name in self.changes and self.changes[name].own_values is not None

    def merge_rows(self, name: str, start: int, base: torch.Tensor) -> torch.Tensor:
        """Merge rows of a base tensor, from row `start` on; the result is float32, or the rows as given where nothing changes them."""
        change = self.changes.get(name)
        return base if change is None else _merge(change, start, base)

    def make_own_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return merged rows of a tensor whose values the adapter holds itself, in float32."""
        change = self.changes[name]
        own = change.own_values
        assert own is not None, f"{name}: asked for values that the adapter does not hold"
        return _merge(change, start, own[start:stop].float() if own.dim() else own.float())


def _merge(change: Change, start: int, base: torch.Tensor) -> torch.Tensor:
    parts, rows = change.parts, slice(start, start + len(base))
    merged = base.to(torch.float32, copy=True)
    if "a" in parts:
        _add_product(merged, parts["b"][rows].float(), parts["a"].float(), change.scale)
        if "magnitude" in parts:
            merged.mul_((parts["magnitude"][rows].float() / merged.norm(dim=1)).unsqueeze(1))
    if "embedding_a" in parts:
        merged = merged + change.scale * (parts["embedding_b"].float() @ parts["embedding_a"][:, rows].float()).T
        if "embedding_magnitude" in parts:
            merged = merged * (parts["embedding_magnitude"].float() / merged.norm(dim=0))
    if "bias_delta" in parts:
        merged.add_(parts["bias_delta"][rows].float() * change.scale)
    if "token_rows" in parts:
        for token, row in zip(change.tokens, parts["token_rows"].float(), strict=True):
            if rows.start <= token < rows.stop:
                merged[token - start] = row
    return merged


def _add_product(base: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> None:
    """Add `(b @ a) * scale` in place, with the same rounding as PEFT."""
    if math.frexp(scale)[0] == 0.5:  # scaling by a power of two does not round, so the smaller matrix can be scaled
        base.addmm_(b * scale, a)
    else:
        base.add_((b @ a).mul_(scale))
