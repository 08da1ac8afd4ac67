"""List every key that a recipe can have: its default, its possible values, and its explanation."""

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from finetune.check.preparation.clean_checks import COMPARED, RULE_KINDS
from finetune.check.preparation.synthesize_checks import VARIATIONS
from finetune.checkpoints.checkpoint_table import list_aliases
from finetune.data.formats.row_formats import FORMATS
from finetune.evaluation.tasks.task_names import TASKS
from finetune.files.resources import list_templates
from finetune.recipe.batches import AUTO, DEFAULT_GLOBAL_BATCH, EARLY_STOPPING
from finetune.recipe.key_texts import KEYS
from finetune.recipe.methods import METHODS
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.recipe.recipe_file import GLOBAL_BATCH
from finetune.recipe.sections import LINEAR_LAYERS, WHOLE_MODULES, Recipe, SourceSection, TaskSection
from finetune.recipe.yaml_loader import TYPE_NAMES
from finetune.rewards.rules import RULES
from finetune.runs.export_settings import ExportSettings

SOURCE, TASK, TRAINER, STAGES, EXPORT, ENDPOINT = "source", "task", "trainer", "stages", "export", "endpoint"
# The values of keys whose type does not show them.
_VALUES: Mapping[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "model.checkpoint": (*list_aliases(), "a hub id", "a folder", "a run directory"),
    "data.train": ("a source", "a list of sources"),
    "data.eval": ("a source", "a list of sources"),
    "data.sources": ("names with a source each",),
    "data.tasks": ("a task", "a list of tasks"),
    "task.name": tuple(TASKS),
    "data.mixture": ("phase1 to phase27", "phase26-4k"),
    "data.format": ("auto", *FORMATS),
    "data.template": ("auto", *list_templates(), "a .jinja file"),
    "adapter.targets": ("all-linear", *LINEAR_LAYERS),
    "adapter.modules_to_save": tuple(WHOLE_MODULES),
    "rewards.rules": (f"names with a number each; the names are {', '.join(RULES)}",),
    "clean.rules": RULE_KINDS,
    "clean.near_duplicates.compare": COMPARED,
    "synthesize.rules": (f"names with a number each; the names are {', '.join(RULES)}",),
    "synthesize.variations": VARIATIONS,
    "endpoints": ("names with a section each",),
    "clean.decontaminate.against": (*TASKS, "a file", "a list of files and tasks"),
    "clean.decontaminate.task_data": ("a folder", "a file"),
    "clean.mix.classifier": ("a folder",),
    "optimizer.states": ("auto", "fresh", "published", "a folder"),
}


@dataclass(frozen=True)
class Key:
    """One key; `default` is written as in YAML, `values` are its possible values, `inner` holds the keys of a section."""

    name: str
    default: str
    values: tuple[str, ...]
    text: str
    inner: tuple["Key", ...] = ()

    @property
    def short_name(self) -> str:
        """The name of the key within its section."""
        return self.name.rpartition(".")[2]


def list_recipe_keys() -> tuple[Key, ...]:
    """Return the keys of a recipe in their order; sections hold their own keys."""
    return tuple(_list_fields(Recipe, ""))


def list_source_keys() -> tuple[Key, ...]:
    """Return the keys of one source of rows that is written as a mapping."""
    return tuple(_list_fields(SourceSection, f"{SOURCE}."))


def list_task_keys() -> tuple[Key, ...]:
    """Return the keys of one entry of data.tasks."""
    return tuple(_list_fields(TaskSection, f"{TASK}."))


def list_endpoint_keys() -> tuple[Key, ...]:
    """Return the keys of one entry of the section endpoints."""
    return tuple(_list_fields(EndpointSection, f"{ENDPOINT}."))


def list_chain_keys() -> tuple[Key, ...]:
    """Return the key `stages` with the keys of a stage."""
    kinds = {"name": "text", "recipe": "text", "synthesize": "a section of keys and values"}
    kinds["export"] = "a section of keys and values"
    inner = tuple(_make_key(f"{STAGES}.{name}", "", (kind,)) for name, kind in kinds.items())
    return (dataclasses.replace(_make_key(STAGES, "", ("a list of stages",)), inner=inner),)


def list_export_keys() -> tuple[Key, ...]:
    """Return the options of a stage that exports."""
    return tuple(_list_fields(ExportSettings, f"{EXPORT}."))


def walk_keys(keys: tuple[Key, ...]) -> Iterator[Key]:
    """Yield all keys, each section before its own keys."""
    for key in keys:
        yield key
        yield from walk_keys(key.inner)


def _list_fields(section: type[Any], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = tuple(_list_fields(hint, f"{name}."))  # type: ignore[arg-type]
            yield Key(name, "", (), KEYS[name], inner)
        elif name == TRAINER:
            yield Key(name, "", (), KEYS[name], _list_trainer_keys())
        else:
            yield _make_key(name, _write_default(field), _VALUES.get(name) or tuple(_describe_type(hint)))


def _list_trainer_keys() -> tuple[Key, ...]:
    """Return the keys of the section trainer that belong to the kit."""
    return (
        _make_key(f"{TRAINER}.{AUTO}", "false", (TYPE_NAMES[bool],)),
        _make_key(f"{TRAINER}.{GLOBAL_BATCH}", str(DEFAULT_GLOBAL_BATCH), (TYPE_NAMES[int],)),
        _make_key(f"{TRAINER}.{EARLY_STOPPING}", "", (TYPE_NAMES[int],)),
    )


def _make_key(name: str, default: str, values: tuple[str, ...]) -> Key:
    return Key(name, default, values, KEYS[name])


def _write_default(field: "dataclasses.Field[Any]") -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()


def _describe_type(hint: Any) -> Iterator[str]:
    """Yield the possible values of a field's type, in the words of the messages that refuse others."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        yield from map(str, members)
    elif origin in (Union, types.UnionType):
        # "a number" includes whole numbers.
        yield from (TYPE_NAMES[member] for member in members if not (member is int and float in members))
    elif origin is tuple:
        yield f"a list, each {TYPE_NAMES[members[0]]}"
    elif origin is not None:
        yield f"names with {TYPE_NAMES[members[1]]} each"
    else:
        yield TYPE_NAMES[hint]
