"""Read the YAML of a recipe file strictly, with YAML 1.2's scalars: `2e-4` is a number, and `no` is a word."""

import re
from pathlib import Path
from typing import Any

import yaml

from finetune.data.reading.patterns import expand_pattern, has_signs
from finetune.errors import RecipeError
from finetune.files.folders import expand_home
from finetune.files.json_files import read_regular_text
from finetune.files.resources import find_close_recipe, find_resource_folder, name_recipe

_MOST_CHARACTERS, _MOST_VALUES = 1_000_000, 100_000
# Keys whose paths are looked for in the recipe's folder too, where a recipe file gives them.
_PATH_KEYS = ("data.train", "data.eval", "data.template", "optimizer.states")
_SOURCES = "data.sources"


class _RecipeLoader(yaml.SafeLoader):
    """A loader with YAML 1.2's numbers and booleans, which refuses a key that stands twice."""


_RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Decimal numbers only: YAML 1.1 reads 010 as eight and 1:30 as ninety.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


_SCALARS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "timestamp"))


def _construct_mapping(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is not a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice, in lines {seen[key]} and {line}",
                problem_mark=key_node.start_mark,
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _construct_text(loader: _RecipeLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if "\0" in text:
        raise yaml.MarkedYAMLError(
            problem="a text holds a NUL character, which no path may have", problem_mark=node.start_mark
        )
    return text


_RecipeLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def load_recipe_file(source: Path) -> dict[str, Any]:
    """Return the content of a recipe file; only its YAML is checked.

    Raises:
        RecipeError: the file is missing or is not YAML.
    """
    try:
        text = read_regular_text(source)
    except IsADirectoryError:
        inside = next(iter(sorted(source.glob("*.yaml"))), None)
        example = "" if inside is None else f", such as {inside}"
        raise RecipeError(str(source), [f"is a folder; name a recipe{example}"]) from None
    except FileNotFoundError:
        raise RecipeError(str(source), [f"there is no such file{_suggest_neighbour(source)}"]) from None
    except UnicodeDecodeError as error:
        raise RecipeError(str(source), [f"is not UTF-8 text (byte {error.start})"]) from error
    except OSError as error:
        raise RecipeError(str(source), [f"cannot be read: {error.strerror}"]) from error
    content = parse_yaml(text, str(source))
    if content is None:
        raise RecipeError(str(source), ["the file is empty; a recipe needs at least data.train"])
    if not isinstance(content, dict):
        raise RecipeError(str(source), [f"must hold keys and values; found {describe_value(content)}"])
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Parse a YAML text; `source` is its name in messages.

    Raises:
        RecipeError: it is not YAML, or a key stands twice.
    """
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(source, [f"has {len(text):,} characters; a recipe has at most {_MOST_CHARACTERS:,}"])
    try:
        root = yaml.compose(text, Loader=_RecipeLoader)
        if root is not None and _count_nodes(root, {}) > _MOST_VALUES:
            raise RecipeError(source, [f"its aliases stand for more than {_MOST_VALUES:,} values"])
        return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(source, [f"{where}{error.problem or error.context}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A date that does not exist, a number of thousands of digits, or thousands of nested brackets.
        raise RecipeError(source, [f"is not YAML that a recipe can hold: {error}"]) from error


def parse_scalar(text: str, source: str) -> Any:
    """Return a text as the scalar that it is to its end: a number, true or false, null, or the text itself.

    Raises:
        RecipeError: it is a number of thousands of digits or a date that does not exist.
    """
    loader = _RecipeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    if tag not in _SCALARS:
        return text
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:
        raise RecipeError(source, [f"is not YAML that a recipe can hold: {error}"]) from error


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a text with every alias written out, without writing them out.

    Raises:
        RecursionError: an alias stands for what it is in.
    """
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count_nodes(part, known) for part in inner)
    return known[id(node)]


def _suggest_neighbour(source: Path) -> str:
    folder = source.parent
    own = ", ".join(sorted(path.name for path in folder.glob("*.yaml")))
    shipped = find_close_recipe(name_recipe(source))
    if shipped is not None:
        return f"; did you mean the shipped recipe {shipped!r}?" + (f" {folder} holds {own}" if own else "")
    if not folder.is_dir():
        return f" (the folder {folder} does not exist either)"
    return f"; {folder} holds {own or 'no recipes (`finetune recipes` lists the shipped ones)'}"


TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a section of keys and values",
    list: "a list",
    type(None): "null",
}


def describe_value(value: Any) -> str:
    """Return a value for a message: lists and sections by their kind, others as they are written in YAML."""
    if isinstance(value, dict):
        return "a section of keys and values"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    return repr(value) if not isinstance(value, bool) else str(value).lower()


def read_override(key: str, text: str, recipe: Path) -> Any:
    """Return the value of `--set key=text` for a recipe file.

    A text that is no list, no mapping and not quoted is one scalar to its end: `#` and `: ` are part of it. Relative paths are
    looked for in the current folder. Where there is no such file, those without `./` are then looked for in the folder of
    `recipe`, unless that is a shipped one.

    Raises:
        RecipeError: a list, a mapping or a quoted text is not YAML.
    """
    name = f"--set {key}={text}"
    bare = text.strip()
    is_quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    value = parse_yaml(text, name) if bare.startswith(("[", "{")) or is_quoted else parse_scalar(bare, name)
    return _anchor_value(key, value, may_fall_back=find_resource_folder("recipes") not in recipe.resolve().parents)


def _anchor_value(key: str, value: Any, *, may_fall_back: bool) -> Any:
    if key == _SOURCES and isinstance(value, dict):
        return {name: _anchor(inner, may_fall_back) for name, inner in value.items()}
    if key not in _PATH_KEYS and not key.startswith(f"{_SOURCES}."):
        return value
    return (
        [_anchor(item, may_fall_back) for item in value] if isinstance(value, list) else _anchor(value, may_fall_back)
    )


def _anchor(value: Any, may_fall_back: bool) -> Any:
    """Return a path, or a source that has one, with the current folder before it; anything else stays as it is."""
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": _anchor(value["path"], may_fall_back)}
    if not isinstance(value, str) or expand_home(value).is_absolute():
        return value
    path = Path.cwd() / value
    exists = bool(expand_pattern(path)[1]) if has_signs(path) else path.exists()
    is_path = "/" in value or Path(value).suffix != ""
    if exists or value.startswith(("./", "../")) or (is_path and not may_fall_back):
        return str(path)
    return value
