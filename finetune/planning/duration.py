"""Estimate how long a step takes: its floating point operations, divided by a card's published rate times an assumed utilisation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.planning.hardware import UTILISATION, Card
from finetune.recipe.batches import read_accumulation, read_batch, read_checkpointing
from finetune.runs.resolved_recipe import ResolvedRecipe


@dataclass(frozen=True)
class StepWork:
    """The tokens of one optimizer step whose rows are all full, and the floating point operations that they cost.

    `streamed_bytes` are those of layers that the step copies from main memory, which takes time of its own.
    """

    tokens: int
    flops: int
    streamed_bytes: int = 0


@dataclass(frozen=True)
class CardTime:
    """The estimated speed on one card."""

    card: str
    seconds_per_step: float
    tokens_per_second: float


def count_work(resolved: ResolvedRecipe, sizes: Mapping[str, Any], scorings: int = 0) -> StepWork:
    """Count the tokens and floating point operations of one step; `scorings` are forward passes beyond those of its method.

    A matrix of n weights costs 2n operations a token in the forward pass, 2n for the gradient of its input, and 2n for the
    gradient of its weights where they are trained. With gradient checkpointing, layers run forward twice, or every n-th of them.
    Attention over rows of s tokens costs 2 s * width a token forward (half of the square, twice), and 2.5 times that backward. The
    loss computes its logits a second time for their gradient. A pair is two texts. A reference model adds one forward pass over
    every text.

    Source: Kaplan et al. (arXiv 2001.08361), section 2.1; FlashAttention-2 (arXiv 2307.08691), section 4.1.
    """
    recipe, trains_all = resolved.recipe, resolved.trains_all_weights
    length, every = recipe.data.max_tokens, read_checkpointing(recipe.trainer)
    linear, table, width = count_matrix_weights(sizes)
    layers = int(sizes["num_hidden_layers"])
    checkpointed = math.ceil(layers / every) / layers if every else 0.0
    trained_rows = trains_all or recipe.adapter.trains_tables
    for_linear = 2 * linear * (2 + checkpointed + (1 if trains_all else 0))
    for_attention = 2 * length * width * layers * (1 + checkpointed + 2.5)
    for_logits = 2 * table * (3 + (1 if trained_rows else 0))
    for_scoring = (scorings + _count_scorings(resolved)) * 2 * (linear + length * width * layers + table)
    tokens = read_batch(recipe) * read_accumulation(recipe) * length * (2 if resolved.method.shape == "pair" else 1)
    return StepWork(tokens, int(tokens * (for_linear + for_attention + for_logits + for_scoring)))


def _count_scorings(resolved: ResolvedRecipe) -> int:
    """Count the forward passes over a row's texts that no gradient is computed for: by the model and by its reference model."""
    has_reference = resolved.method.has_reference and not resolved.recipe.trainer.get("precompute_ref_log_probs")
    extra = resolved.method.scored_texts
    return int(has_reference) * (1 + extra) + extra


def count_streamed_bytes(resolved: ResolvedRecipe, layers: int, held: int, scorings: int = 0) -> int:
    """Count the bytes of layers that a step copies to the device, where all `layers` take `held` bytes of main memory.

    Each micro-batch passes L layers forward and backward. The two that a pass ends with are there for the next one, so it copies
    L - 2. A pass of a reference model copies about L.
    """
    copies = 2 * max(layers - 2, 0) + layers * (scorings + _count_scorings(resolved))
    return copies * held // layers * read_accumulation(resolved.recipe)


def count_matrix_weights(sizes: Mapping[str, Any]) -> tuple[int, int, int]:
    """Count the weights of all linear layers and of one embedding table; return the width of all attention heads as well."""
    hidden, inner = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    heads, key_heads = int(sizes["num_attention_heads"]), int(sizes["num_key_value_heads"])
    width = heads * int(sizes.get("head_dim") or hidden // heads)
    key_width = width // heads * key_heads
    layer = hidden * (2 * width + 2 * key_width + 3 * inner)
    return layer * int(sizes["num_hidden_layers"]), int(sizes["vocab_size"]) * hidden, width


def estimate_time(work: StepWork, card: Card, processes: int = 1) -> CardTime:
    """Estimate the seconds of a step on one card, and the tokens per second of all processes together."""
    seconds = work.flops / (card.tflops * 1e12 * UTILISATION)
    return CardTime(card.name, seconds, work.tokens * processes / seconds)
