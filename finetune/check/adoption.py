"""Give a recipe that continues an adapter the settings of that adapter and of its base model.

A setting that the recipe leaves out is taken from the adapter. A setting that differs is a problem. The same rules hold for a
recipe that names an earlier run and for a later stage of a chain. This module never imports torch.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from finetune.errors import ExportError
from finetune.files.json_files import read_json
from finetune.models.adapter_config import check_language_adapter, read_adapter_config
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import Draft
from finetune.recipe.sections import LINEAR_LAYERS, SCORE_HEADS, WHOLE_MODULES, Recipe
from finetune.runs.results import Result
from finetune.runs.run_files import PEFT_CONFIG_FILE

Form = Mapping[str, Any]
# The keys of a recipe whose values an adapter fixes.
FORM_KEYS = (
    "adapter.kind",
    "adapter.rank",
    "adapter.alpha",
    "adapter.rslora",
    "adapter.dora",
    "adapter.train_tokens",
    "adapter.modules_to_save",
    "adapter.targets",
    "adapter.layers",
    "model.quantize",
    "model.architecture",
    "model.max_positions",
    "model.rope_theta",
)
# A later run may change these two, to extend the context.
_MAY_CHANGE = ("model.max_positions", "model.rope_theta")


def adopt_earlier_run(draft: Draft, earlier: Result, own: Collection[str]) -> Draft:
    """Return the draft with the settings of the run that it continues, and with the problems that arise.

    `own` holds the keys that must not contradict that run.
    """
    problems = list(_list_misfits(draft.recipe, earlier))
    if problems or not earlier.is_adapter:
        return draft.add_problems(*problems)
    recipe, problems = adopt_form(draft.recipe, read_form(earlier), str(earlier.folder), draft.given, own)
    return replace(draft, recipe=recipe).add_problems(*problems)


def adopt_form(
    recipe: Recipe, form: Form, owner: str, given: Collection[str], own: Collection[str]
) -> tuple[Recipe, list[str]]:
    """Return a recipe with the settings of the adapter that it continues (`form`), and the problems that arise.

    `owner` names the adapter in messages. `given` holds all keys that the recipe sets. `own` holds those of them that must not
    contradict the form: in a chain, the keys of the stage itself.
    """
    kept = {key: value for key, value in form.items() if key not in _MAY_CHANGE or key not in given}
    if METHODS[recipe.method].head == "score" and "adapter.modules_to_save" in kept:  # its model has no language head
        kept["adapter.modules_to_save"] = tuple(name for name in kept["adapter.modules_to_save"] if name != "lm_head")
    problems = [
        f"{key}: {owner} was trained with {_describe(value)}, and its adapter must keep that; set that, or remove "
        f"this key; found {_describe(_look_up(recipe, key))}"
        for key, value in kept.items()
        if key in own and _look_up(recipe, key) != value
    ]
    if recipe.adapter.init != "default" and "adapter.init" in own and "adapter.init" not in form:
        problems.append(f"adapter.init: has no effect, as this run continues the adapter of {owner}; remove this key")
    for section in ("model", "adapter"):
        values = {key.partition(".")[2]: value for key, value in kept.items() if key.startswith(f"{section}.")}
        recipe = replace(recipe, **{section: replace(vars(recipe)[section], **values)})
    init = form.get("adapter.init", "default")
    return replace(recipe, adapter=replace(recipe.adapter, init=init)), problems


def list_method_misfits(trained: str, method: str, name: str, key: str) -> Iterator[str]:
    """Yield why `method` cannot continue the result of the method `trained`; `name` begins the message about that result."""
    before, after = METHODS.get(trained), METHODS.get(method)
    if before is not None and after is not None and before.trains_reward_model and not after.trains_reward_model:
        yield f"{key}: {name} a reward model, which cannot generate text; {method} needs a language model"


def _list_misfits(recipe: Recipe, earlier: Result) -> Iterator[str]:
    """Yield why a recipe cannot continue an earlier run, whatever its settings."""
    name = recipe.model.checkpoint
    if earlier.lineage is None and earlier.is_adapter:
        try:
            check_language_adapter(earlier.folder, read_adapter_config(earlier.folder))
        except ExportError as error:
            yield f"model.checkpoint: {error}"
    if earlier.lineage is not None:
        yield from list_method_misfits(earlier.lineage.method, recipe.method, f"{name} is", "model.checkpoint")
    if earlier.is_adapter and recipe.adapter.trains_all_weights:
        yield (
            f"adapter.kind: {name} is an adapter, so training cannot continue with all weights; export it and set "
            "model.checkpoint to the export, or remove this key"
        )


def read_stage_form(recipe: Recipe) -> Form:
    """Return the settings of the adapter that a stage of a chain will leave behind.

    One that changes its base is saved as plain LoRA of twice the rank, with the same scale. One that holds what quantization rounded
    off keeps its `init`, since it belongs to the quantized base.
    """
    form = {key: _look_up(recipe, key) for key in FORM_KEYS}
    adapter = recipe.adapter
    if adapter.beginning.holds_rounding:
        form["adapter.init"] = adapter.init
    if adapter.changes_base:
        scale = adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
        form |= {"adapter.rank": 2 * adapter.rank, "adapter.alpha": scale * 2 * adapter.rank, "adapter.rslora": False}
    return form


def read_form(earlier: Result) -> Form:
    """Return the settings of an adapter on disk that its folder records."""
    config = read_json(earlier.folder / PEFT_CONFIG_FILE) or {}
    form: dict[str, Any] = {
        "adapter.rank": config.get("r"),
        "adapter.alpha": config.get("lora_alpha"),
        "adapter.rslora": bool(config.get("use_rslora")),
        "adapter.dora": bool(config.get("use_dora")),
        "adapter.train_tokens": _read_tokens(config.get("trainable_token_indices")),
        "adapter.modules_to_save": _read_whole_modules(config.get("modules_to_save")),
        "adapter.layers": _read_layers(config.get("layers_to_transform")),
    }
    targets = config.get("target_modules")
    if isinstance(targets, list):
        form["adapter.targets"] = _name_targets(targets)
    if earlier.lineage is not None:
        names = ("quantize", "architecture", "max_positions", "rope_theta")
        form |= {f"model.{name}": getattr(earlier.lineage, name) for name in names}
        if earlier.lineage.holds_rounding:
            form["adapter.init"] = earlier.lineage.init
    return form


def _read_tokens(indices: Any) -> tuple[int, ...]:
    if isinstance(indices, dict):
        indices = next(iter(indices.values()), ())
    return tuple(indices or ())


def _read_whole_modules(modules: Any) -> tuple[str, ...]:
    """Return the names that a recipe gives to PEFT's `modules_to_save`, without the head that PEFT adds to a reward model."""
    names = {known: name for name, known in WHOLE_MODULES.items()}
    modules = [modules] if isinstance(modules, str) else modules or ()
    return tuple(sorted(names.get(module, module) for module in modules if module not in SCORE_HEADS))


def _read_layers(layers: Any) -> tuple[int, ...]:
    return (layers,) if isinstance(layers, int) else tuple(layers or ())


def _name_targets(targets: Collection[str]) -> tuple[str, ...]:
    """Return the layers of an adapter in one spelling: all seven linear layers are `all-linear`."""
    return ("all-linear",) if set(targets) == set(LINEAR_LAYERS) else tuple(sorted(targets))


def _look_up(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    if name == "modules_to_save":
        return tuple(sorted(value))
    return _name_targets(value) if name == "targets" else value


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
