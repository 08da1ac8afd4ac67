"""Check what a recipe says about rewards: its rules, and the reward run that it names as its judge. Never imports torch.

The judge reads with the base of the model that is trained, so that no second one is held; both must be the same.
"""

from collections.abc import Iterator
from pathlib import Path

from finetune.checkpoints.checkpoint_table import is_another_start
from finetune.errors import FinetuneError
from finetune.files.resources import list_templates
from finetune.recipe.methods import JUDGE_METHOD, Method
from finetune.recipe.recipe_file import describe_unknown_key
from finetune.recipe.sections import JudgeSection, Recipe
from finetune.rewards.rules import RULES
from finetune.runs.results import Lineage, Result, open_result


def check_rewards(recipe: Recipe, method: Method, earlier: Result | None) -> Iterator[str]:
    """Yield what is wrong with the rewards of a method whose model writes the answers, and with its prompts."""
    rewards = recipe.rewards
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
        yield from _check_judge(recipe, earlier)
    yield from _check_prompts(recipe)


def _check_prompts(recipe: Recipe) -> Iterator[str]:
    if recipe.data.overflow in ("truncate", "split"):
        yield f"data.overflow: {recipe.data.overflow} would cut prompts before their end; use drop, or error"


def _check_judge(recipe: Recipe, earlier: Result | None) -> Iterator[str]:
    """Yield what is wrong with a recipe's judge."""
    judge = recipe.rewards.judge
    if judge.weight <= 0:
        yield f"rewards.judge.weight: must be above 0; found {judge.weight}"
    if len(judge.clip) != 2 or not judge.clip[0] < judge.clip[1]:
        yield f"rewards.judge.clip: must be the lowest and the highest score that count, such as [-20, 10]; found {list(judge.clip)}"
    if not judge.run:
        yield f"rewards.judge.run: is missing; name a finished run of method: {JUDGE_METHOD}"
        return
    try:
        result = open_result(Path(judge.run).expanduser())
    except FinetuneError as error:
        yield f"rewards.judge.run: {error}"
        return
    if not result.is_reward_model:
        yield f"rewards.judge.run: {judge.run} is no reward model; train one with method: {JUDGE_METHOD}"
        return
    yield from _check_borrowing(recipe, result)
    if result.lineage is not None:
        yield from _check_same_form(recipe, result.lineage, earlier)


def _check_borrowing(recipe: Recipe, result: Result) -> Iterator[str]:
    """Name what keeps a judge from reading with the base of the run."""
    if not result.is_adapter:
        yield (
            f"rewards.judge.run: all weights of {recipe.rewards.judge.run} were trained, so it would be a second model in "
            "memory; train the reward model with adapter.kind: lora"
        )
    if recipe.adapter.trains_all_weights:
        yield "adapter.kind: the judge reads with the base, which must stay as it is; set lora, or use rewards.rules alone"
    if recipe.adapter.init == "pissa":
        yield "adapter.init: pissa changes the base, which the judge reads with; remove this key"
    if recipe.model.architecture == "native":
        yield "model.architecture: the judge reads with the Llama form of the base; remove this key"


def _check_same_form(recipe: Recipe, judge: Lineage, earlier: Result | None) -> Iterator[str]:
    """Compare base and template by names and records; a run compares their content before it loads any weights."""
    name, checkpoint, template = recipe.rewards.judge.run, recipe.model.checkpoint, recipe.data.template
    if judge.quantize != recipe.model.quantize:
        yield (
            f"model.quantize: the judge {name} was trained on a base held as {judge.quantize}, and reads with the one of "
            f"this run; set {judge.quantize}; found {recipe.model.quantize}"
        )
    if judge.rope_theta != recipe.model.rope_theta:
        theirs = "that of its base" if judge.rope_theta is None else str(judge.rope_theta)
        yield (
            f"model.rope_theta: the judge {name} was trained with {theirs}, and reads with the base of this run; set the same, "
            f"or leave both out; found {recipe.model.rope_theta}"
        )
    start = earlier.lineage if earlier is not None and earlier.is_adapter else None
    if start is None:
        differs = is_another_start(judge.checkpoint, checkpoint)
    else:
        differs = start.base_fingerprint != judge.base_fingerprint
    if differs:
        yield (
            f"rewards.judge.run: {name} was trained on {judge.checkpoint}, and this run on {start.checkpoint if start else checkpoint}; "
            "the judge reads with the base of this run, so both must come from the same checkpoint"
        )
    if template in list_templates() and template != judge.template:
        yield f"data.template: the judge {name} reads texts in {judge.template}; set that; found {template}"
    elif template == "auto" and start is not None and start.template_fingerprint != judge.template_fingerprint:
        yield (
            f"rewards.judge.run: {name} reads texts in {judge.template}, and {checkpoint} writes them in {start.template}; "
            "both must have the same template"
        )
