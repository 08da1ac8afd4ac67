"""Read the options of a TRL configuration class from the installed source files, without importing TRL.

Importing TRL takes seconds and imports torch. Parsing four files takes a few hundredths of a second, and always reads the
version that is installed.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import MachineError
from finetune.recipe.yaml_loader import TYPE_NAMES

# The base class of TRL's configuration classes. TRL imports it lazily, so its file cannot be found by following imports.
_ROOT_CLASS = ("TrainingArguments", "transformers", "training_args.py")
_ENUM_FILES = (("transformers", "training_args.py"), ("transformers", "trainer_utils.py"))
_SCALARS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class TrainerOption:
    """One option: its type annotation as text, its allowed words if they are limited, and its default if it is a literal."""

    name: str
    annotation: str
    choices: tuple[str, ...] = ()
    default: Any = None

    def describe_mismatch(self, value: Any) -> str | None:
        """Return what `value` must be instead, or None if it fits."""
        if self.choices and isinstance(value, str) and value not in self.choices:
            return f"one of {', '.join(self.choices)}"
        members = set(_split_union(self.annotation))
        known = {member for member in members if member.split("[")[0] in _SCALARS}
        # A YAML file can give an enumeration by its word; values of other classes cannot come from YAML.
        allowed = tuple(kind for member in known for kind in _SCALARS[member.split("[")[0]])
        if members - known:
            allowed = (*allowed, str)
        fits = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
        if fits:
            return None
        # The last type of a kind is its own; the others are what Python takes for it.
        kinds = [_SCALARS[member.split("[")[0]][-1] for member in _split_union(self.annotation) if member in known]
        return " or ".join(dict.fromkeys(TYPE_NAMES[kind] for kind in (*kinds, *([str] if members - known else []))))


@cache
def read_trainer_options(module: str, class_name: str) -> Mapping[str, TrainerOption]:
    """Return the options of a TRL configuration class such as `trl.trainer.sft_config`, `SFTConfig`: name -> option.

    Raises:
        MachineError: TRL or transformers is not installed.
    """
    enums = {name: words for package, file in _ENUM_FILES for name, words in _read_enums(_parse(package, file))}
    options: dict[str, TrainerOption] = {}
    for field in _walk_fields(module, class_name):
        annotation = ast.unparse(field.annotation)
        name = ast.unparse(field.target)
        words = [enums[member] for member in _split_union(annotation) if member in enums]
        options[name] = TrainerOption(
            name, annotation, words[0] if words else _read_choices(field), _read_default(field.value)
        )
    return options


def _walk_fields(module: str, class_name: str) -> Iterator[ast.AnnAssign]:
    """Yield the fields of a dataclass, those of its base classes first."""
    package, _, rest = module.partition(".")
    tree = _parse(package, *f"{rest.replace('.', '/')}.py".split("/"))
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for base in definition.bases:
        base_name = ast.unparse(base)
        if base_name == _ROOT_CLASS[0]:
            root = next(n for n in _parse(*_ROOT_CLASS[1:]).body if isinstance(n, ast.ClassDef) and n.name == base_name)
            yield from _list_fields(root)
        else:
            yield from _walk_fields(_find_import(tree, base_name, module), base_name)
    yield from _list_fields(definition)


def _list_fields(definition: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and not _is_internal(node):
            yield node


def _is_internal(field: ast.AnnAssign) -> bool:
    """Tell whether a field is no argument of the constructor."""
    return any(
        keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for call in [field.value]
        if isinstance(call, ast.Call)
        for keyword in call.keywords
    ) or ast.unparse(field.annotation).startswith("ClassVar")


def _find_import(tree: ast.Module, name: str, module: str) -> str:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            parent = module.rsplit(".", node.level)[0]
            return f"{parent}.{node.module}" if node.level else str(node.module)
    raise MachineError(
        f"{module}: the installed trl defines {name} in a way this kit does not know; install a trl version that "
        "yulan-finetune allows: pip install --upgrade yulan-finetune"
    )


@cache
def _parse(package: str, *parts: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(f"{package} is not installed; run: pip install yulan-finetune")
    return ast.parse(Path(spec.submodule_search_locations[0], *parts).read_text(encoding="utf-8"))


def _read_enums(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "ExplicitEnum" for base in node.bases):
            values = [inner.value for inner in node.body if isinstance(inner, ast.Assign)]
            yield (
                node.name,
                tuple(str(v.value) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)),
            )


def _read_choices(field: ast.AnnAssign) -> tuple[str, ...]:
    for node in ast.walk(field):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    return tuple(str(item.value) for item in value.elts if isinstance(item, ast.Constant))
    return ()


def _read_default(value: ast.expr | None) -> Any:
    """Return a default that is a literal, alone or in `field(default=...)`; None for any other default."""
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _split_union(annotation: str) -> list[str]:
    return [member.strip() for member in annotation.split("|")]
