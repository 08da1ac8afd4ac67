"""A recipe that goes on from an earlier run takes over what that run decided: how its base was held, and its adapter's form.

What a recipe does not say is filled in, and what it says otherwise is a problem. Needs no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from finetune.errors import FinetuneError
from finetune.files.json_files import read_json
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import Draft
from finetune.recipe.sections import LINEAR_LAYERS, Recipe
from finetune.runs.results import Result, find_earlier

# A later stage may reach further than the one before.
_MAY_CHANGE = ("model.max_positions", "model.rope_theta")


def adopt_earlier_run(draft: Draft) -> Draft:
    """Return a draft with the settings of the run that its `model.checkpoint` names, and its problems with them."""
    try:
        earlier = find_earlier(draft.recipe.model.checkpoint)
    except FinetuneError as error:
        return replace(draft, problems=(*draft.problems, f"model.checkpoint: {error}"))
    if earlier is None:
        return draft
    problems = list(_list_misfits(draft.recipe, earlier))
    if problems or earlier.kind == "model":
        return replace(draft, problems=(*draft.problems, *problems))
    settled = {
        key: value for key, value in _read_settings(earlier).items() if key not in _MAY_CHANGE or key not in draft.given
    }
    for key, value in settled.items():
        found = _look_up(draft.recipe, key)
        if key in draft.given and found != value:
            problems.append(
                f"{key}: {earlier.folder} was trained with {_describe(value)}, and goes on with it; remove this key; "
                f"found {_describe(found)}"
            )
    if draft.recipe.adapter.init != "default":
        problems.append(f"adapter.init: has no effect, as the adapter of {earlier.folder} goes on; remove this key")
    recipe = draft.recipe
    for section in ("model", "adapter"):
        values = {key.partition(".")[2]: value for key, value in settled.items() if key.startswith(f"{section}.")}
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    return replace(draft, recipe=recipe, problems=(*draft.problems, *problems))


def _list_misfits(recipe: Recipe, earlier: Result) -> Iterator[str]:
    """Name what cannot go on at all."""
    name, method = recipe.model.checkpoint, METHODS.get(recipe.method)
    trained_by = METHODS.get(earlier.origin.method) if earlier.origin is not None else None
    if method is not None and trained_by is not None and trained_by.head == "score" != method.head:
        yield f"model.checkpoint: {name} is a reward model, which cannot speak; {recipe.method} needs a language model"
    if earlier.kind == "adapter" and recipe.adapter.kind == "none":
        yield (
            f"adapter.kind: {name} is an adapter, which cannot be trained with all weights; export it and start from the "
            "export, or remove this key"
        )


def _read_settings(earlier: Result) -> Mapping[str, Any]:
    """Return what an adapter's folder says of the keys that decide its form."""
    config = read_json(earlier.folder / "adapter_config.json") or {}
    settings: dict[str, Any] = {
        "adapter.rank": config.get("r"),
        "adapter.alpha": config.get("lora_alpha"),
        "adapter.rslora": bool(config.get("use_rslora")),
        "adapter.dora": bool(config.get("use_dora")),
        "adapter.train_tokens": _read_tokens(config.get("trainable_token_indices")),
    }
    targets = config.get("target_modules")
    if isinstance(targets, list):
        settings["adapter.targets"] = ("all-linear",) if set(targets) == set(LINEAR_LAYERS) else tuple(sorted(targets))
    if earlier.origin is not None:
        settings["model.quantize"] = earlier.origin.quantize
        settings["model.architecture"] = earlier.origin.architecture
        settings["model.max_positions"] = earlier.origin.max_positions
        settings["model.rope_theta"] = earlier.origin.rope_theta
    return settings


def _read_tokens(indices: Any) -> tuple[int, ...]:
    if isinstance(indices, dict):
        indices = next(iter(indices.values()), ())
    return tuple(indices or ())


def _look_up(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    return tuple(sorted(value)) if name == "targets" else value


def _describe(value: Any) -> str:
    return (
        str(list(value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )
