"""Read recipes: strict YAML into frozen sections, with every problem listed at once.

`--set section.key=value` overrides the file, and the file overrides the defaults of the sections.
The names that a recipe uses (of methods, templates, formats, options of the trainer) are checked in `finetune/check`.
"""

import dataclasses
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finetune.recipe.foreign_names import describe_unknown_option
from finetune.recipe.sections import Recipe
from finetune.recipe.trl_options import read_trainer_options
from finetune.recipe.yaml_loader import TYPE_NAMES, describe_value, load_recipe_file, read_override

# transformers' options for the micro-batch size and the accumulation steps.
BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
# transformers' options for gradient checkpointing; of the second one, the key for every n-th layer.
CHECKPOINTING, CHECKPOINTING_OPTIONS, EVERY_N_LAYERS = (
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "every_n_layers",
)
# The names that transformers 5 gave these options; recipes use those that people know, and may use these.
NEWER_NAMES: Mapping[str, str] = {
    CHECKPOINTING: "activation_checkpointing",
    CHECKPOINTING_OPTIONS: "activation_checkpointing_kwargs",
}
# The kit's own option for the effective batch size.
GLOBAL_BATCH = "global_batch"
# The source of content that stands in no recipe file.
NO_FILE = Path()


@dataclass(frozen=True)
class Draft:
    """A recipe as read from `source`, with the problems found so far; `given` holds the keys that the recipe sets."""

    source: Path
    recipe: Recipe
    problems: tuple[str, ...]
    given: frozenset[str] = frozenset()

    def add_problems(self, *problems: str) -> "Draft":
        """Return a copy of the draft with more problems."""
        return dataclasses.replace(self, problems=(*self.problems, *problems))


def read_recipe(source: Path, overrides: Sequence[str] = ()) -> Draft:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises:
        RecipeError: the file is missing or is not YAML. All other problems are collected in the draft.
    """
    return draft_recipe(source, load_recipe_file(source), overrides)


def draft_recipe(source: Path, content: dict[str, Any], overrides: Sequence[str] = ()) -> Draft:
    """Make a draft of a recipe file's content, with `section.key=value` overrides applied."""
    expand_shorthand(content)
    problems: list[str] = []
    apply_overrides(content, overrides, problems, source)
    recipe = read_section(Recipe, content, "", problems)
    return Draft(source, recipe, tuple(problems), frozenset(list_keys(content)))


def expand_shorthand(content: dict[str, Any]) -> None:
    """Replace `trainer: auto` with its long form, and remove empty sections."""
    if content.get("trainer") == "auto":
        content["trainer"] = {"auto": True}
    if content.get("trainer", {}) is None:
        del content["trainer"]
    _drop_empty_sections(content, Recipe)


def _drop_empty_sections(content: dict[str, Any], section: type[Any]) -> None:
    for name, hint in get_type_hints(section).items():
        if not dataclasses.is_dataclass(hint) or name not in content:
            continue
        if content[name] is None:
            del content[name]
        elif isinstance(content[name], dict):
            _drop_empty_sections(content[name], hint)  # type: ignore[arg-type]


def list_keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every key of a recipe's content, the inner ones as `section.key`."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from list_keys(value, f"{prefix}{key}.")


def apply_overrides(
    content: dict[str, Any], overrides: Iterable[str], problems: list[str], source: Path = NO_FILE
) -> None:
    """Apply every `section.key=value` to the content of the recipe file `source`.

    Whole sections come first, since they would replace what other overrides set in them. Then comes `trainer.auto`: it removes
    batch sizes that the recipe sets, and must keep those of other overrides.
    """
    for override in sorted(
        overrides, key=lambda text: ("." in text.partition("=")[0], not text.startswith("trainer.auto="))
    ):
        apply_override(content, override, problems, source)


def apply_override(content: dict[str, Any], override: str, problems: list[str], source: Path = NO_FILE) -> None:
    """Apply one `section.key=value` to the content of a recipe file, and add what is wrong with it to `problems`."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        problems.append(f"--set {override}: must read section.key=value, such as model.quantize=nf4")
        return
    *sections, key = path.split(".")
    target = content
    for section in sections:
        inner = target.get(section)
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            problems.append(f"--set {override}: {section!r} is not a section")
            return
        target = inner
    target[key] = read_override(path, text, source)
    if path == "trainer.auto" and target[key] is True:
        _open_split(target)


def read_split_option(trainer: Mapping[str, Any], name: str) -> Any:
    """Return the micro-batch size or the accumulation steps of a section `trainer`, or the default of all trainers."""
    options = read_trainer_options("transformers.training_args", "TrainingArguments")
    return trainer.get(name, options[name].default)


def _open_split(trainer: dict[str, Any]) -> None:
    """Remove the recipe's batch sizes and gradient checkpointing, which `auto` will pick, and keep its effective batch size."""
    batch, accumulation = (read_split_option(trainer, key) for key in (BATCH, ACCUMULATION))
    if not isinstance(batch, int) or not isinstance(accumulation, int):
        return  # the check of the trainer's options reports it
    if {BATCH, ACCUMULATION} & set(trainer):
        trainer.setdefault(GLOBAL_BATCH, batch * accumulation)
    for key in (BATCH, ACCUMULATION, CHECKPOINTING, CHECKPOINTING_OPTIONS):
        trainer.pop(key, None)


def read_section(section: type[Any], content: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Make a frozen section of a recipe's content, and add unknown and mistyped keys to `problems`."""
    hints = get_type_hints(section)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            problems.append(f"{name}: {describe_unknown_key(key, hints)}")
            continue
        try:
            values[key] = _convert(value, hints[key], name, problems)
        except _MismatchError as mismatch:
            problems.append(f"{name}: must be {mismatch}; found {mismatch.found or describe_value(value)}")
    return section(**values)


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that a key is unknown, with its name here where it is another tool's, or its nearest known key."""
    return describe_unknown_option(key, known)


class _MismatchError(Exception):
    """A value does not have the type of its key; the text names that type, and `found` the part of the value that does not have it."""

    def __init__(self, expected: str, found: str = "") -> None:
        super().__init__(expected)
        self.found = found


def _convert(value: Any, hint: Any, name: str, problems: list[str]) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _MismatchError("a section of keys and values")
        return read_section(hint, value, f"{name}.", problems)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in get_args(hint):
            raise _MismatchError(f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint))
    if origin is tuple:
        return _convert_tuple(value, get_args(hint)[0], name, problems)
    if origin is not None:  # the remaining generic is Mapping
        return _convert_mapping(value, get_args(hint)[1], name, problems)
    return _convert_scalar(value, hint)


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    for member in members:
        try:
            return None if member is type(None) and value is None else _convert_scalar(value, member)
        except _MismatchError:
            continue
    names = [TYPE_NAMES[member] for member in members if not (member is int and float in members)]
    raise _MismatchError(" or ".join(names))


def _convert_tuple(value: Any, member: Any, name: str, problems: list[str]) -> tuple[Any, ...]:
    # One file or one module need not be written as a list.
    values, converted = value if isinstance(value, list) else [value], []
    for number, item in enumerate(values, 1):
        try:
            converted.append(_convert_item(item, member, f"{name}[{number}].", problems))
        except _MismatchError as mismatch:
            found = f"{describe_value(item)} as entry {number} of the list" if isinstance(value, list) else ""
            raise _MismatchError(f"{mismatch}, or a list of such", found) from None
    return tuple(converted)


def _convert_mapping(value: Any, member: Any, name: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _MismatchError("keys and values")
    if member is Any:
        return dict(value)
    converted = {}
    for key, inner in value.items():
        try:
            converted[key] = _convert_item(inner, member, f"{name}.{key}.", problems)
        except _MismatchError as mismatch:
            problems.append(f"{name}.{key}: must be {mismatch}; found {describe_value(inner)}")
    return converted


def _convert_item(value: Any, member: Any, prefix: str, problems: list[str]) -> Any:
    """Convert an item of a list, or a value under a name that the user chose, to a scalar or a section."""
    members = get_args(member) or (member,)
    section = next((kind for kind in members if dataclasses.is_dataclass(kind)), None)
    if section is not None and isinstance(value, dict):
        return read_section(section, value, prefix, problems)  # type: ignore[arg-type]
    try:
        return _convert_scalar(value, members[0])
    except _MismatchError as mismatch:
        raise _MismatchError(f"{mismatch} or {TYPE_NAMES[dict]}" if section is not None else str(mismatch)) from None


def _convert_scalar(value: Any, member: Any) -> Any:
    if member is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # In Python a bool is an int; in a recipe it is not.
    if not isinstance(value, member) or (isinstance(value, bool) and member is not bool):
        raise _MismatchError(TYPE_NAMES[member])
    if isinstance(value, float) and not math.isfinite(value):
        raise _MismatchError("a finite number")
    return value
