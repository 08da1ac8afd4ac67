"""What a model does with a few texts: activations and attention of each layer, and the loss by position and by source."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.sources import read_source
from finetune.data.settings import Source
from finetune.errors import DataError, Place
from finetune.files.folders import expand_home
from finetune.models.opening import LoadedModel
from finetune.models.row_loss import split_model

# Rows that are read of each source, and tokens of each row: an attention matrix of 512 x 512 for 30 heads takes 31 MB.
ROWS_OF_SOURCE, TOKENS_OF_ROW = 16, 512


@dataclass(frozen=True)
class SourcedText:
    """A text, and the name of what it comes from."""

    source: str
    text: str


def read_texts(files: Sequence[Path]) -> list[SourcedText]:
    """Read the first rows of each source: the name of a row's file, or its own `source`.

    Raises:
        DataError: a file cannot be read, or a row has no `text`.
    """
    texts: list[SourcedText] = []
    counts = Counter[str]()
    for location in files:
        for name, rows in read_source(Source(expand_home(location), split="evaluation")):
            for place, raw in rows:
                text = _read_text(require_row(raw), Path(name).stem, place)
                counts[text.source] += 1
                if counts[text.source] <= ROWS_OF_SOURCE:
                    texts.append(text)
    return texts


def _read_text(row: dict[str, Any], stem: str, place: Place) -> SourcedText:
    text, source = row.get("text"), row.get("source", stem)
    if not isinstance(text, str) or not text.strip():
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"has no text in text; a row of --rows has text, and may have source; found {found}", place)
    return SourcedText(str(source), text)


@dataclass
class _LayerSums:
    """Sums over the tokens of all rows for one layer."""

    rms: float = 0.0
    largest: float = 0.0
    entropy: float = 0.0
    spread: float = 0.0
    tokens: int = 0
    queries: int = 0

    def add_states(self, states: torch.Tensor) -> None:
        """Add the hidden states (1, tokens, width) that a layer gives."""
        numbers = states[0].float()
        self.rms += float(numbers.square().mean(-1).sqrt().sum())
        self.largest = max(self.largest, float(numbers.abs().max()))
        self.tokens += len(numbers)

    def add_attention(self, weights: torch.Tensor) -> None:
        """Add the attention weights (1, heads, queries, keys); the first query sees itself alone and says nothing."""
        shares = weights[0, :, 1:].float()
        entropies = torch.special.entr(shares).sum(-1).mean(0)
        most = torch.log(torch.arange(2, len(entropies) + 2, device=weights.device))
        self.entropy += float(entropies.sum())
        self.spread += float((entropies / most).sum())
        self.queries += len(entropies)

    def to_json(self) -> dict[str, float]:
        """Return means over the tokens: the root mean square and the largest number of the states, the entropy in nats.

        `attention_spread` is the entropy over that of equal weights.
        """
        return {
            "activation_rms": self.rms / self.tokens,
            "activation_largest": self.largest,
            "attention_entropy": self.entropy / self.queries,
            "attention_spread": self.spread / self.queries,
        }


@dataclass
class _LossSum:
    total: float = 0.0
    tokens: int = 0

    def add(self, losses: torch.Tensor) -> None:
        self.total += float(losses.sum())
        self.tokens += len(losses)

    def to_json(self) -> dict[str, float]:
        return {"loss": self.total / self.tokens, "tokens": self.tokens}


@torch.inference_mode()
def measure_activity(loaded: LoadedModel, texts: Sequence[SourcedText]) -> dict[str, Any]:
    """Run a model on texts, one at a time, and return figures of its layers and its loss in nats per token.

    Positions are counted from 0, for the token that is predicted, and gathered from powers of two: `4` stands for 4 to 7. The model is
    left with the attention kernel that gives its weights, which is slower than others.

    Raises:
        DataError: no text has two tokens.
    """
    model = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    model.set_attn_implementation("eager")
    backbone, head = split_model(loaded.model)
    layers: list[Any] = list(backbone.get_submodule("layers").children())
    sums = [_LayerSums() for _ in layers]
    whole, positions, sources = _LossSum(), dict[int, _LossSum](), dict[str, _LossSum]()
    handles = [handle for layer, one in zip(layers, sums, strict=True) for handle in _watch(layer, one)]
    try:
        for text in texts:
            limit = min(TOKENS_OF_ROW, int(model.config.max_position_embeddings))
            ids = loaded.tokenizer.encode(text.text)[:limit]
            if len(ids) < 2:
                continue
            row = torch.tensor([ids], device=model.device)
            states = backbone(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
            losses = nn.functional.cross_entropy(head(states).float(), row[0, 1:], reduction="none")
            whole.add(losses)
            sources.setdefault(text.source, _LossSum()).add(losses)
            for first in (1 << power for power in range(len(losses).bit_length())):
                positions.setdefault(first, _LossSum()).add(losses[first - 1 : 2 * first - 1])
    finally:
        for handle in handles:
            handle.remove()
    if not whole.tokens:
        raise DataError("--rows: no text has two tokens; give longer texts")
    return {
        **whole.to_json(),
        "positions": {str(first): one.to_json() for first, one in sorted(positions.items()) if one.tokens},
        "sources": {source: one.to_json() for source, one in sources.items()},
        "layers": [one.to_json() for one in sums],
    }


def _watch(layer: Any, sums: _LayerSums) -> tuple[RemovableHandle, RemovableHandle]:
    def add_states(module: nn.Module, arguments: Any, output: Any) -> None:
        sums.add_states(output[0] if isinstance(output, tuple) else output)

    def add_attention(module: nn.Module, arguments: Any, output: Any) -> None:
        sums.add_attention(output[1])

    return layer.register_forward_hook(add_states), layer.self_attn.register_forward_hook(add_attention)
