"""A copy of a shipped recipe, with every key that it could have beside those that it sets."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from finetune.guide.recipe_keys import STAGES, TRAINER, Key, list_export_keys, list_recipe_keys
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe

_WIDTH = 110
_PLAIN = re.compile(r"[\w./-]+")
_NOTE = "Lines such as `#seed: 42` are keys with their defaults: remove the # to set one."


def copy_recipe(source: Path) -> str:
    """Return the text of a shipped recipe's file; the keys that it does not set stand in it as comments.

    Keys that it sets, and its comments, stay as they are, but for files that ship with it: those get absolute paths, so that
    the copy works anywhere. A chain gets the options of an export explained instead, since its stages share their keys.
    """
    text = _make_paths_absolute(source.read_text(encoding="utf-8"), source.parent)
    content = _compose(text)
    if STAGES in _read_keys(content):
        return text + "".join(_explain_export())
    return "\n".join([*_insert_keys(text.splitlines(), content), ""])


def _compose(text: str) -> yaml.MappingNode:
    content = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(content, yaml.MappingNode):
        raise TypeError("a shipped recipe must be a mapping")
    return content


def _read_keys(node: yaml.Node) -> dict[str, yaml.Node]:
    return {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _make_paths_absolute(text: str, folder: Path) -> str:
    """Write out every value that names a file beside the recipe."""
    for node in sorted(_walk_values(_compose(text)), key=lambda node: -node.start_mark.index):
        file = folder / node.value
        if node.value and file.is_file():
            path = file.resolve().as_posix()
            written = path if _PLAIN.fullmatch(path) else json.dumps(path, ensure_ascii=False)
            text = text[: node.start_mark.index] + written + text[node.end_mark.index :]
    return text


def _walk_values(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _walk_values(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _walk_values(value)


def _insert_keys(lines: list[str], content: yaml.MappingNode) -> Iterator[str]:
    """Yield the lines of a recipe, each section with its missing keys behind it, then the sections that it lacks."""
    given = _read_keys(content)
    method = given["method"].value if "method" in given else Recipe().method
    behind: dict[int, list[str]] = {}
    for key in list_recipe_keys():
        if key.inner and key.name in given:
            behind[_find_last_line(given[key.name])] = list(_list_missing(key, given[key.name], method))
    first = content.start_mark.line
    yield from lines[:first]
    yield from _write_prose(_NOTE, "")
    for number, line in enumerate(lines[first:], first):
        yield line
        yield from behind.get(number, ())
    for key in list_recipe_keys():
        if key.name not in given:
            yield from _write_key(key, "")


def _find_last_line(node: yaml.Node) -> int:
    """Return the last line of a value, before the comments behind it."""
    if isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        return _find_last_line(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and node.value and not node.flow_style:
        return _find_last_line(node.value[-1])
    return node.end_mark.line


def _list_missing(section: Key, node: yaml.Node, method: str) -> Iterator[str]:
    given = _read_keys(node)
    for key in section.inner:
        if key.short_name not in given:
            yield from _write_key(key, "  ")
    if section.name == TRAINER:
        class_name = METHODS[method].config_class
        yield from _write_prose(
            f"Any other option of {class_name} goes here by its name, except those that the kit decides.", "  "
        )


def _write_key(key: Key, indent: str) -> Iterator[str]:
    """Yield a key that is not set: its text, and a line that sets it to its default once its # is removed."""
    if key.inner:
        yield from _write_prose(key.text, indent)
        # A section with nothing in it says nothing, so that every line inside it can be used by itself.
        yield f"{indent}{key.short_name}:"
        for inner in key.inner:
            yield from _write_key(inner, f"{indent}  ")
        return
    yield from _write_prose(f"{key.text} Values: {', '.join(key.values)}.", indent)
    yield f"{indent}#{key.short_name}: {key.default}"


def _write_prose(text: str, indent: str) -> Iterable[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _explain_export() -> Iterator[str]:
    yield "# Options of export, with their defaults:\n"
    for key in list_export_keys():
        yield f"#   {key.short_name}: {key.default}\n"
        for line in _write_prose(f"{key.text} Values: {', '.join(key.values)}.", ""):
            yield f"#       {line.removeprefix('# ')}\n"
