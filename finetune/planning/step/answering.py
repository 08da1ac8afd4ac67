"""What a plan makes of online methods: a step that can be run dry, and the room of writing answers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.planning.step.stages import ADAPTER, FROZEN_ADAPTER, GRADIENTS, OPTIMIZER, WEIGHTS
from finetune.planning.step.tracker import Peak
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.recipe.methods import DEFAULT_METHOD
from finetune.recipe.sections import Recipe
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import open_result
from finetune.runs.run_files import PEFT_WEIGHTS_FILE

_HELD_ALWAYS = WEIGHTS | {ADAPTER, FROZEN_ADAPTER, OPTIMIZER, GRADIENTS}
_CACHE_BYTES = 2  # of a key or value, in 16 bits


def read_answer_tokens(resolved: ResolvedRecipe) -> int:
    """Return the most tokens of an answer."""
    return int(resolved.read_option("max_completion_length"))


def as_training_step(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """Return a recipe whose step can be run without content, and takes the memory of the method's.

    That of a method whose model writes its answers is a supervised step over as many full prompts with their answers: its own
    trainer would have to write them first. What the reference adds is a pass that keeps nothing. All others run as they are.
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
    """Return how often the reference reads the answers of an online method: once, where their distance counts."""
    return int(resolved.method.is_online and float(resolved.read_option("beta")) != 0)


def count_cache_bytes(resolved: ResolvedRecipe, sizes: Mapping[str, Any]) -> int:
    """Return the keys and values of all answers that are written together: those of a whole step."""
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
    """Return the bytes of the adapter that a judge adds to the base of the run; it lies in memory as in its file, in float32."""
    judge = recipe.rewards.judge
    return (open_result(Path(judge.run)).folder / PEFT_WEIGHTS_FILE).stat().st_size if judge.run else 0


def add_answers(peak: Peak, cache_bytes: int) -> tuple[str, dict[str, int]]:
    """Return the stage and the parts of a step's peak, or those of the time when answers are written, if that takes more."""
    held = {part: size for part, size in peak.parts.items() if part in _HELD_ALWAYS}
    if sum(held.values()) + cache_bytes <= sum(peak.parts.values()):
        return peak.stage, dict(peak.parts)
    return "writing answers", {**held, "answers: keys and values": cache_bytes}
