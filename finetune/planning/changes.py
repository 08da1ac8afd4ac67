"""What makes a training step smaller: the changes that leave the training as it is first, then those that alter it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.recipe.batches import read_accumulation, read_batch
from finetune.recipe.sections import Recipe
from finetune.runs.resolved_recipe import ResolvedRecipe

_SHORTEST_ROW = 256
_LONGEST_ANSWER = 512  # TRL's default


@dataclass(frozen=True)
class Change:
    """Settings to change together, what that does, and whether the same gradients are computed as before."""

    settings: Mapping[str, Any]
    reason: str
    keeps_training: bool = True

    def describe(self) -> str:
        """Return the change as one would type it, with its reason."""
        return f"{' '.join(f'-s {key}={_write(value)}' for key, value in self.settings.items())}: {self.reason}"


def _write(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | list) else str(value)


def is_packed(resolved: ResolvedRecipe) -> bool:
    """Tell whether a row of a batch may hold several documents, which then need a mask."""
    return bool(resolved.recipe.trainer.get("packing")) or resolved.method.is_pretraining


def list_changes(resolved: ResolvedRecipe) -> Iterator[Change]:
    """Yield what would take less room than a recipe does, in the order to try it in."""
    recipe, method, trains_all = resolved.recipe, resolved.method, resolved.trains_all_weights
    batch, trainer = read_batch(recipe), recipe.trainer
    if batch > 1:
        rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch * read_accumulation(recipe)}
        yield Change({f"trainer.{key}": value for key, value in rows.items()}, "the same steps, a row at a time")
    if not trainer.get("gradient_checkpointing", True):
        yield Change({"trainer.gradient_checkpointing": True}, "keeps one tensor a layer and computes the rest again")
    if method.is_online:
        half = max(int(trainer.get("max_completion_length", _LONGEST_ANSWER)) // 2, _SHORTEST_ROW)
        yield Change({"trainer.max_completion_length": half}, "shorter answers", keeps_training=False)
    elif not trainer.get("activation_offloading") and not method.is_pretraining:
        yield Change({"trainer.activation_offloading": True}, "what layers keep waits in the host's memory")
    if method.is_pretraining:
        yield from _list_moments(recipe)
    elif "8bit" not in str(trainer.get("optim", "")):
        yield Change({"trainer.optim": "paged_adamw_8bit"}, "optimizer states in 8 bits, paged", keeps_training=False)
    if recipe.adapter.train_tokens:
        reason = "no copies of the tables and no gradient of the head, but chat tokens stay as they are"
        yield Change({"adapter.train_tokens": []}, reason, keeps_training=False)
    if not trains_all and recipe.model.quantize == "none":
        yield Change({"model.quantize": "nf4"}, "linear layers in 4 bits", keeps_training=False)
    if recipe.data.max_tokens > _SHORTEST_ROW:
        half = max(recipe.data.max_tokens // 2, _SHORTEST_ROW)
        yield Change({"data.max_tokens": half}, "shorter rows", keeps_training=False)
    if trains_all and not method.is_pretraining:
        adapter = {"adapter.kind": "lora", "model.quantize": "nf4", "model.dtype": "auto"}
        yield Change(adapter, "trains an adapter of a 4-bit base instead of all weights", keeps_training=False)


def _list_moments(recipe: Recipe) -> Iterator[Change]:
    if recipe.optimizer.moments == "float32":
        reason = "float32 copies and moments in main memory; every step waits for them"
        yield Change({"optimizer.moments": "cpu"}, reason)
        yield Change({"optimizer.moments": "8bit"}, "moments in 8 bits", keeps_training=False)


def apply_change(resolved: ResolvedRecipe, change: Change) -> ResolvedRecipe:
    """Return a recipe with a change made."""
    for key, value in change.settings.items():
        section, _, name = key.partition(".")
        if section == "trainer":
            resolved = resolved.change_trainer(**{name: value})
        else:
            value = tuple(value) if isinstance(value, list) else value
            values = replace(vars(resolved.recipe)[section], **{name: value})
            resolved = resolved.change(**{section: values})
    return resolved
