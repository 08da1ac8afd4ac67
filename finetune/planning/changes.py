"""Changes to a recipe that lower the peak memory of its training step."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.recipe.batches import read_accumulation, read_batch, read_checkpointing, read_checkpointing_options
from finetune.recipe.recipe_file import CHECKPOINTING, CHECKPOINTING_OPTIONS, EVERY_N_LAYERS
from finetune.recipe.sections import Recipe
from finetune.runs.resolved_recipe import ResolvedRecipe

_SHORTEST_ROW = 256


@dataclass(frozen=True)
class Change:
    """Settings that are changed together, and why; `keeps_training` says that the gradients stay the same."""

    settings: Mapping[str, Any]
    reason: str
    keeps_training: bool = True

    def describe(self) -> str:
        """Return the change as options of the command line, with its reason."""
        return f"{' '.join(f'-s {_write(key, value)}' for key, value in self.settings.items())}: {self.reason}"

    def describe_effect(self) -> str:
        """Return the change as options with its reason, marked where it alters the training."""
        return f"{self.describe()}{'' if self.keeps_training else ' (alters the training)'}"


def write_setting(value: Any) -> str:
    """Return a value as a recipe and `--set` write it on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {write_setting(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool | list) else str(value)


def _write(key: str, value: Any) -> str:
    text = f"{key}={write_setting(value)}"
    return f"'{text}'" if " " in text else text


def is_packed(resolved: ResolvedRecipe) -> bool:
    """Tell whether a row of a batch may hold several documents; attention then needs a mask."""
    return bool(resolved.recipe.trainer.get("packing")) or resolved.method.is_pretraining


def checkpoint_every_layer(trainer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the settings that give every layer gradient checkpointing, or None where every layer has it."""
    every = read_checkpointing(trainer)
    if every == 0:
        return {f"trainer.{CHECKPOINTING}": True}
    if every == 1:
        return None
    return {f"trainer.{CHECKPOINTING_OPTIONS}": {**read_checkpointing_options(trainer), EVERY_N_LAYERS: 1}}


def list_changes(resolved: ResolvedRecipe, *, has_gpu: bool, can_stream: bool) -> Iterator[Change]:
    """Yield the changes that may lower the peak memory of a recipe, in the order in which to try them.

    What moves to main memory frees a GPU's only (`has_gpu`), and layers are streamed by some engines only (`can_stream`).
    """
    recipe, method, trains_all = resolved.recipe, resolved.method, resolved.trains_all_weights
    batch, trainer = read_batch(recipe), recipe.trainer
    if batch > 1:
        rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch * read_accumulation(recipe)}
        yield Change(
            {f"trainer.{key}": value for key, value in rows.items()}, "micro-batch size 1, same effective batch size"
        )
    if (more := checkpoint_every_layer(trainer)) is not None:
        yield Change(more, "stores one tensor per layer; the backward pass computes the other activations again")
    if method.is_online:
        half = max(int(resolved.read_option("max_completion_length")) // 2, _SHORTEST_ROW)
        yield Change({"trainer.max_completion_length": half}, "shorter answers", keeps_training=False)
    elif has_gpu and not trainer.get("activation_offloading") and not method.is_pretraining:
        yield Change({"trainer.activation_offloading": True}, "activations wait in the host's memory")
    if has_gpu and can_stream and not (trains_all or recipe.model.stream_layers or recipe.rewards.judge.run):
        yield Change(
            {"model.stream_layers": True}, "layers of the base wait in the host's memory, and are copied for each pass"
        )
    if method.is_pretraining:
        yield from _list_moments(recipe)
    elif "8bit" not in str(trainer.get("optim", "")):
        yield Change(
            {"trainer.optim": "paged_adamw_8bit"},
            "optimizer moments in 8 bits, paged to the host's memory",
            keeps_training=False,
        )
    if recipe.adapter.train_tokens:
        reason = "no copies of the embedding tables and no gradient of the head; the chat tokens are not trained"
        yield Change({"adapter.train_tokens": []}, reason, keeps_training=False)
    if recipe.adapter.modules_to_save:
        reason = "no float32 copies of whole modules, their gradients and moments; these modules are not trained"
        yield Change({"adapter.modules_to_save": []}, reason, keeps_training=False)
    if not trains_all and recipe.model.quantize == "none":
        yield Change({"model.quantize": "nf4"}, "weights of linear layers in 4 bits", keeps_training=False)
    if recipe.data.max_tokens > _SHORTEST_ROW:
        half = max(recipe.data.max_tokens // 2, _SHORTEST_ROW)
        yield Change({"data.max_tokens": half}, "shorter rows", keeps_training=False)
    if trains_all and not method.is_pretraining:
        adapter = {"adapter.kind": "lora", "model.quantize": "nf4", "model.dtype": "auto"}
        yield Change(adapter, "trains an adapter on a 4-bit base model instead of all weights", keeps_training=False)


def _list_moments(recipe: Recipe) -> Iterator[Change]:
    """Yield the cheaper ways to hold the optimizer state of a pre-training run."""
    if recipe.optimizer.moments == "float32":
        reason = "float32 copies of the weights and moments in main memory; every step waits for them"
        yield Change({"optimizer.moments": "cpu"}, reason)
        yield Change({"optimizer.moments": "8bit"}, "moments in 8 bits", keeps_training=False)


def apply_change(resolved: ResolvedRecipe, change: Change) -> ResolvedRecipe:
    """Return a recipe with the settings of a change."""
    for key, value in change.settings.items():
        section, _, name = key.partition(".")
        if section == "trainer":
            resolved = resolved.change_trainer(**{name: value})
        else:
            value = tuple(value) if isinstance(value, list) else value
            values = replace(vars(resolved.recipe)[section], **{name: value})
            resolved = resolved.change(**{section: values})
    return resolved
