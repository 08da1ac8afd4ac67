"""Plan online methods, whose model writes its own answers: a step that stands in for theirs, and the memory of generation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.planning.step.step_parts import ADAPTER, FROZEN_ADAPTER, GRADIENTS, OPTIMIZER, WEIGHTS
from finetune.planning.step.tracker import Peak
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.recipe.methods import DEFAULT_METHOD
from finetune.recipe.sections import Recipe
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import open_result
from finetune.runs.run_files import PEFT_WEIGHTS_FILE

_HELD_WHILE_GENERATING = WEIGHTS | {ADAPTER, FROZEN_ADAPTER, OPTIMIZER, GRADIENTS}
_CACHE_BYTES = 2  # one element of a key or a value, in 16 bits


def read_answer_tokens(resolved: ResolvedRecipe) -> int:
    """Return the largest number of tokens of an answer."""
    return int(resolved.read_option("max_completion_length"))


def as_training_step(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """Return a recipe whose training step can be planned: a supervised one in place of an online one, any other unchanged.

    An online trainer would have to generate answers first, which tensors without content cannot do. Its step takes the memory of
    a supervised step over as many rows, each a full prompt with a full answer. The pass of the reference model runs without
    gradients and keeps no activations, so it adds nothing to the peak.
    """
    if not resolved.method.is_online:
        return resolved
    recipe = resolved.recipe
    supervised = DEFAULT_METHOD
    known = set(read_trainer_options(supervised.config_module, supervised.config_class)) - set(supervised.owned)
    trainer = {key: value for key, value in recipe.trainer.items() if key in known and key != "loss_type"}
    trainer["per_device_train_batch_size"] = read_batch(recipe)
    length = recipe.data.max_tokens + read_answer_tokens(resolved)
    return resolved.change(method=supervised.name, data=replace(recipe.data, max_tokens=length), trainer=trainer)


def count_reference_scorings(resolved: ResolvedRecipe) -> int:
    """Count the forward passes of an online method's reference model: one, or none where `beta` is 0 and no KL is computed."""
    return int(resolved.method.is_online and float(resolved.read_option("beta")) != 0)


def count_cache_bytes(resolved: ResolvedRecipe, sizes: Mapping[str, Any]) -> int:
    """Count the bytes of keys and values of all answers that are generated together; by default those of a whole step."""
    recipe = resolved.recipe
    if not resolved.method.is_online:
        return 0
    steps = int(recipe.trainer.get("steps_per_generation") or read_accumulation(recipe))
    answers = int(recipe.trainer.get("generation_batch_size") or read_batch(recipe) * steps)
    heads = int(sizes["num_key_value_heads"])
    head = int(sizes.get("head_dim") or int(sizes["hidden_size"]) // int(sizes["num_attention_heads"]))
    tokens = recipe.data.max_tokens + read_answer_tokens(resolved)
    return answers * tokens * int(sizes["num_hidden_layers"]) * 2 * heads * head * _CACHE_BYTES


def count_judge_bytes(recipe: Recipe) -> int:
    """Count the bytes of the judge's adapter; it shares the base model of the run, and is held in float32 as in its file."""
    judge = recipe.rewards.judge
    return (open_result(Path(judge.run)).folder / PEFT_WEIGHTS_FILE).stat().st_size if judge.run else 0


def add_answers(peak: Peak, cache_bytes: int) -> tuple[str, dict[str, int]]:
    """Return phase and parts of the peak: those of the training step, or those of generation where it takes more memory."""
    held = {part: size for part, size in peak.parts.items() if part in _HELD_WHILE_GENERATING}
    if sum(held.values()) + cache_bytes <= sum(peak.parts.values()):
        return peak.phase, dict(peak.parts)
    return "writing answers", {**held, "answers: keys and values": cache_bytes}
