"""Check the section `rewards` of a recipe: its rules and its judge, which is a reward model. Never imports torch.

The judge is an adapter on the base model of the run, so that memory holds the base model once. The judge must therefore have
been trained on the same base model.
"""

from collections.abc import Iterator

from finetune.checkpoints.checkpoint_table import have_different_weights
from finetune.errors import FinetuneError
from finetune.files.folders import expand_home
from finetune.files.resources import list_templates
from finetune.recipe.methods import JUDGE_METHOD, Method
from finetune.recipe.recipe_file import describe_unknown_key
from finetune.recipe.sections import JudgeSection, Recipe
from finetune.rewards.rules import RULES
from finetune.runs.results import Lineage, Result, open_result


def check_rewards(recipe: Recipe, method: Method, earlier: Result | None) -> Iterator[str]:
    """Yield the problems of an online method's rewards, and of settings that do not fit its prompts."""
    rewards = recipe.rewards
    if not rewards.rules and rewards.judge == JudgeSection():
        yield (
            f"rewards.rules: is missing; {method.name} needs rules with their weights, such as {{final_answer: 1.0}}, "
            "or rewards.judge.run, the run directory of a reward model"
        )
    for name, weight in rewards.rules.items():
        if name not in RULES:
            yield f"rewards.rules.{name}: {describe_unknown_key(name, RULES)}"
        elif weight <= 0:
            yield f"rewards.rules.{name}: must be above 0 (penalties are negative by themselves); found {weight}"
    needs_length = any(RULES[name].needs_length for name in rewards.rules if name in RULES)
    if needs_length and rewards.length_tokens is None:
        yield "rewards.length_tokens: is missing; the rule length needs the number of tokens up to which it gives 1"
    if rewards.length_tokens is not None and (not needs_length or rewards.length_tokens < 1):
        reason = "must be at least 1" if needs_length else "needs the rule length, which rewards.rules lacks; remove it"
        yield f"rewards.length_tokens: {reason}; found {rewards.length_tokens}"
    if recipe.trainer.get("auto"):
        yield (
            f"trainer.auto: cannot predict the memory for generating answers, as {method.name} does; remove this key and set "
            "trainer.per_device_train_batch_size by hand"
        )
    if rewards.judge != JudgeSection():
        yield from _check_judge(recipe, earlier)
    yield from _check_prompts(recipe)


def _check_prompts(recipe: Recipe) -> Iterator[str]:
    if recipe.data.overflow in ("truncate", "split"):
        yield f"data.overflow: {recipe.data.overflow} would cut off the end of prompts; set drop or error"


def _check_judge(recipe: Recipe, earlier: Result | None) -> Iterator[str]:
    """Yield the problems of a recipe's judge."""
    judge = recipe.rewards.judge
    if judge.weight <= 0:
        yield f"rewards.judge.weight: must be above 0; found {judge.weight}"
    if len(judge.clip) != 2 or not judge.clip[0] < judge.clip[1]:
        yield f"rewards.judge.clip: must be the lowest and the highest score, such as [-20, 10]; found {list(judge.clip)}"
    if not judge.run:
        yield f"rewards.judge.run: is missing; name a finished run of method: {JUDGE_METHOD}"
        return
    try:
        result = open_result(expand_home(judge.run))
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
    """Yield why a judge cannot use the base model of the run."""
    if not result.is_adapter:
        yield (
            f"rewards.judge.run: all weights of {recipe.rewards.judge.run} were trained, so it would be a second model in "
            "memory; train the reward model with adapter.kind: lora"
        )
    if recipe.adapter.trains_all_weights:
        yield (
            "adapter.kind: the judge uses the base model of this run, so training must not change it; set lora, or use "
            "rewards.rules alone"
        )
    if recipe.adapter.changes_base:
        yield f"adapter.init: {recipe.adapter.init} changes the base model, which the judge uses too; remove this key"
    if recipe.model.stream_layers:
        yield "model.stream_layers: the judge uses the base model's layers at other times than the training does; remove this key"
    if recipe.model.architecture == "native":
        yield "model.architecture: the judge needs a base model of Llama weights; remove this key"


def _check_same_form(recipe: Recipe, judge: Lineage, earlier: Result | None) -> Iterator[str]:
    """Compare the judge's base model and template with the run's, by their names and by what earlier runs recorded.

    A run compares their content before it loads any weights.
    """
    name, checkpoint, template = recipe.rewards.judge.run, recipe.model.checkpoint, recipe.data.template
    if judge.quantize != recipe.model.quantize:
        yield (
            f"model.quantize: the judge {name} was trained with {judge.quantize}, and uses the base model of this run; "
            f"set {judge.quantize}; found {recipe.model.quantize}"
        )
    if judge.rope_theta != recipe.model.rope_theta:
        theirs = "that of its checkpoint" if judge.rope_theta is None else str(judge.rope_theta)
        yield (
            f"model.rope_theta: the judge {name} was trained with {theirs}, and uses the base model of this run; set the same, "
            f"or leave both out; found {recipe.model.rope_theta}"
        )
    continued = earlier.lineage if earlier is not None and earlier.is_adapter else None
    if continued is None:
        differs = have_different_weights(judge.checkpoint, checkpoint)
    else:
        differs = continued.base_fingerprint != judge.base_fingerprint
    if differs:
        yield (
            f"rewards.judge.run: {name} was trained on {judge.checkpoint}, and this run trains on "
            f"{continued.checkpoint if continued else checkpoint}; the judge uses the base model of this run, so both must have the "
            "same base checkpoint"
        )
    if template in list_templates() and template != judge.template:
        yield f"data.template: the judge {name} was trained with {judge.template}; set that; found {template}"
    elif template == "auto" and continued is not None and continued.template_fingerprint != judge.template_fingerprint:
        yield (
            f"rewards.judge.run: {name} was trained with the template {judge.template}, and {checkpoint} with {continued.template}; "
            "both must have the same template"
        )
