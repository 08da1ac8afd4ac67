"""What an adapter brings along when training continues it: its own form, and how its base was held.

What a recipe leaves out is filled in; what it sets otherwise is a problem. A recipe that names an earlier run and a later stage
of a chain follow the same rules. Never imports torch.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from finetune.errors import FinetuneError
from finetune.files.json_files import read_json
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import Draft
from finetune.recipe.sections import LINEAR_LAYERS, Recipe
from finetune.runs.results import Result, find_earlier
from finetune.runs.run_files import PEFT_CONFIG_FILE

Form = Mapping[str, Any]
# The keys of a recipe that an adapter brings along.
FORM_KEYS = (
    "adapter.kind",
    "adapter.rank",
    "adapter.alpha",
    "adapter.rslora",
    "adapter.dora",
    "adapter.train_tokens",
    "adapter.targets",
    "model.quantize",
    "model.architecture",
    "model.max_positions",
    "model.rope_theta",
)
# These two a later run may change: it may reach further than the one before.
_MAY_CHANGE = ("model.max_positions", "model.rope_theta")


def adopt_earlier_run(draft: Draft) -> tuple[Draft, Result | None]:
    """Return a draft with the settings of the run that its `model.checkpoint` names, and that run's result."""
    try:
        earlier = find_earlier(draft.recipe.model.checkpoint)
    except FinetuneError as error:
        return replace(draft, problems=(*draft.problems, f"model.checkpoint: {error}")), None
    if earlier is None:
        return draft, None
    problems = list(_list_misfits(draft.recipe, earlier))
    if problems or not earlier.is_adapter:
        return replace(draft, problems=(*draft.problems, *problems)), earlier
    recipe, problems = adopt_form(draft.recipe, read_form(earlier), str(earlier.folder), draft.given, draft.given)
    return replace(draft, recipe=recipe, problems=(*draft.problems, *problems)), earlier


def adopt_form(
    recipe: Recipe, form: Form, owner: str, given: Collection[str], own: Collection[str]
) -> tuple[Recipe, list[str]]:
    """Return a recipe with the form of the adapter that it continues, and the problems that it has with it.

    `owner` is what the adapter is called in messages. `given` holds the keys that the recipe sets anywhere, `own` those that
    it sets for this very run, which must not contradict the form.
    """
    kept = {key: value for key, value in form.items() if key not in _MAY_CHANGE or key not in given}
    problems = [
        f"{key}: {owner} was trained with {_describe(value)}, and goes on with it; remove this key; "
        f"found {_describe(_look_up(recipe, key))}"
        for key, value in kept.items()
        if key in own and _look_up(recipe, key) != value
    ]
    if recipe.adapter.init != "default" and "adapter.init" in own:
        problems.append(f"adapter.init: has no effect, as the adapter of {owner} goes on; remove this key")
    for section in ("model", "adapter"):
        values = {key.partition(".")[2]: value for key, value in kept.items() if key.startswith(f"{section}.")}
        recipe = replace(recipe, **{section: replace(vars(recipe)[section], **values)})
    return replace(recipe, adapter=replace(recipe.adapter, init="default")), problems


def list_method_misfits(trained: str, method: str, name: str, key: str) -> Iterator[str]:
    """Yield why one method cannot continue what another has trained; `name` is what that is called in messages."""
    before, after = METHODS.get(trained), METHODS.get(method)
    if before is not None and after is not None and before.trains_reward_model and not after.trains_reward_model:
        yield f"{key}: {name} a reward model, which cannot speak; {method} needs a language model"


def _list_misfits(recipe: Recipe, earlier: Result) -> Iterator[str]:
    """Name what cannot be continued at all."""
    name = recipe.model.checkpoint
    if earlier.lineage is not None:
        yield from list_method_misfits(earlier.lineage.method, recipe.method, f"{name} is", "model.checkpoint")
    if earlier.is_adapter and recipe.adapter.trains_all_weights:
        yield (
            f"adapter.kind: {name} is an adapter, which cannot be trained with all weights; export it and start from the "
            "export, or remove this key"
        )


def read_stage_form(recipe: Recipe) -> Form:
    """Return the form of the adapter that a stage of a chain will train."""
    return {key: _look_up(recipe, key) for key in FORM_KEYS}


def read_form(earlier: Result) -> Form:
    """Return the form of an adapter on disk, as far as its folder says."""
    config = read_json(earlier.folder / PEFT_CONFIG_FILE) or {}
    form: dict[str, Any] = {
        "adapter.rank": config.get("r"),
        "adapter.alpha": config.get("lora_alpha"),
        "adapter.rslora": bool(config.get("use_rslora")),
        "adapter.dora": bool(config.get("use_dora")),
        "adapter.train_tokens": _read_tokens(config.get("trainable_token_indices")),
    }
    targets = config.get("target_modules")
    if isinstance(targets, list):
        form["adapter.targets"] = ("all-linear",) if set(targets) == set(LINEAR_LAYERS) else tuple(sorted(targets))
    if earlier.lineage is not None:
        names = ("quantize", "architecture", "max_positions", "rope_theta")
        form |= {f"model.{name}": getattr(earlier.lineage, name) for name in names}
    return form


def _read_tokens(indices: Any) -> tuple[int, ...]:
    if isinstance(indices, dict):
        indices = next(iter(indices.values()), ())
    return tuple(indices or ())


def _look_up(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    return tuple(sorted(value)) if name == "targets" else value


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
