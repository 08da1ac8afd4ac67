"""Estimate how long a run takes: its arithmetic by formula, over a card's published rate times an assumed utilisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.planning.hardware import UTILISATION, Card
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.runs.resolved_recipe import ResolvedRecipe


@dataclass(frozen=True)
class StepWork:
    """The tokens of one optimizer step, all rows full, and the floating point operations they cost."""

    tokens: int
    flops: int


@dataclass(frozen=True)
class CardTime:
    """An estimate for one card."""

    card: str
    seconds_per_step: float
    tokens_per_second: float


def count_work(resolved: ResolvedRecipe, sizes: Mapping[str, Any], scorings: int = 0) -> StepWork:
    """Return the work of one step, with so many more scorings of its texts than its method has by itself.

    A matrix of n weights costs 2n operations a token forward and as many for the gradient of its input; the gradient of
    the weights as many again where they are trained; a checkpointed layer runs forward twice. Attention over rows of s
    tokens costs 2 s * width a token forward (half of the square, twice), and 2.5 times that backward. The loss computes
    its logits a second time for their gradient. A pair is two texts; a reference scores every text once more, forward only.
    Source: Kaplan et al. (arXiv 2001.08361), section 2.1; FlashAttention-2 (arXiv 2307.08691), section 4.1.
    """
    recipe, trains_all = resolved.recipe, resolved.trains_all_weights
    again = 1 if recipe.trainer.get("gradient_checkpointing", True) else 0
    length = recipe.data.max_tokens
    linear, table, width = count_matrix_weights(sizes)
    layers = int(sizes["num_hidden_layers"])
    trained_rows = trains_all or bool(recipe.adapter.train_tokens)
    for_linear = 2 * linear * (2 + again + (1 if trains_all else 0))
    for_attention = 2 * length * width * layers * (1 + again + 2.5)
    for_logits = 2 * table * (3 + (1 if trained_rows else 0))
    for_scoring = (scorings + _count_scorings(resolved)) * 2 * (linear + length * width * layers + table)
    tokens = read_batch(recipe) * read_accumulation(recipe) * length * (2 if resolved.method.shape == "pair" else 1)
    return StepWork(tokens, int(tokens * (for_linear + for_attention + for_logits + for_scoring)))


def _count_scorings(resolved: ResolvedRecipe) -> int:
    """Return how often a text is read to be scored rather than learnt from, once for every text that is.

    KTO has the model and its reference score an answer that belongs to another prompt, too.
    """
    has_reference = resolved.method.has_reference and not resolved.recipe.trainer.get("precompute_ref_log_probs")
    return int(has_reference) * (2 if resolved.method.name == "kto" else 1) + int(resolved.method.name == "kto")


def count_matrix_weights(sizes: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the weights of all linear layers, those of one table, and the width of all attention heads together."""
    hidden, inner = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    heads, key_heads = int(sizes["num_attention_heads"]), int(sizes["num_key_value_heads"])
    width = heads * int(sizes.get("head_dim") or hidden // heads)
    key_width = width // heads * key_heads
    layer = hidden * (2 * width + 2 * key_width + 3 * inner)
    return layer * int(sizes["num_hidden_layers"]), int(sizes["vocab_size"]) * hidden, width


def estimate_time(work: StepWork, card: Card, processes: int = 1) -> CardTime:
    """Return how long a card would take at the assumed utilisation, and what as many cards as processes get done together."""
    seconds = work.flops / (card.tflops * 1e12 * UTILISATION)
    return CardTime(card.name, seconds, work.tokens * processes / seconds)
