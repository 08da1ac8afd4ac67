"""Check what a recipe says about rewards, without importing torch."""

from collections.abc import Iterator

from finetune.check.judge_run import check_judge_settings
from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import describe_unknown_key
from finetune.recipe.sections import JudgeSection, Recipe, RewardsSection
from finetune.rewards.rules import RULES


def check_rewards(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield what is wrong with the rewards of a recipe, and with the rows of a method that asks prompts."""
    rewards = recipe.rewards
    if not method.is_online:
        if rewards != RewardsSection():
            yield f"rewards: has no effect on {method.name}; remove it, or set method: grpo or rloo"
        return
    if not rewards.rules and rewards.judge == JudgeSection():
        yield (
            f"rewards.rules: is missing; {method.name} needs rules with their weights, such as {{final_answer: 1.0}}, "
            "or rewards.judge.run: a reward run"
        )
    for name, weight in rewards.rules.items():
        if name not in RULES:
            yield f"rewards.rules.{name}: {describe_unknown_key(name, RULES)}"
        elif weight <= 0:
            yield f"rewards.rules.{name}: must be above 0 (penalties are negative by themselves); found {weight}"
    needs_length = any(RULES[name].needs_length for name in rewards.rules if name in RULES)
    if needs_length and rewards.length_tokens is None:
        yield "rewards.length_tokens: is missing; the rule length needs the number of tokens up to which an answer is fine"
    if rewards.length_tokens is not None and (not needs_length or rewards.length_tokens < 1):
        reason = "must be at least 1" if needs_length else "belongs to the rule length, which is not used; remove it"
        yield f"rewards.length_tokens: {reason}; found {rewards.length_tokens}"
    if recipe.trainer.get("auto"):
        yield f"trainer.auto: does not know the room that writing answers takes; set the sizes for {method.name} by hand"
    if rewards.judge != JudgeSection():
        yield from check_judge_settings(recipe)
    yield from _check_prompts(recipe)


def _check_prompts(recipe: Recipe) -> Iterator[str]:
    if recipe.data.overflow in ("truncate", "split"):
        yield f"data.overflow: {recipe.data.overflow} would cut prompts before their end; use drop, or error"
