"""Copy a shipped recipe, and add every key that it does not set as a comment."""

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
_NOTE = "Lines such as `#seed: 42` are keys with their defaults. Remove the # to set a key."


def copy_recipe(source: Path) -> str:
    """Return the text of a shipped recipe, with the keys that it does not set as comments.

    The recipe's own keys and comments are kept. Files beside the recipe get absolute paths, so that the copy works in any folder.
    A chain gets only the options of an export as comments, because its stages share their keys.
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
    """Replace every value that names a file beside the recipe with the file's absolute path."""
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
    """Yield the lines of a recipe, with the missing keys at the end of each section, then the missing sections."""
    given = _read_keys(content)
    method = given["method"].value if "method" in given else Recipe().method
    behind: dict[int, list[str]] = {}
    for key in list_recipe_keys():
        if key.inner and key.name in given:
            behind[_find_last_line(given[key.name])] = list(_list_missing(key, given[key.name], method))
    first = content.start_mark.line
    yield from lines[:first]
    yield from write_prose(_NOTE, "")
    for number, line in enumerate(lines[first:], first):
        yield line
        yield from behind.get(number, ())
    for key in list_recipe_keys():
        if key.name not in given:
            yield from _write_key(key, "")


def _find_last_line(node: yaml.Node) -> int:
    """Return the number of a value's last line, without the comments after it."""
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
        yield from write_prose(
            f"Any other option of {class_name} may stand here under its own name, except those that the kit sets.", "  "
        )


def _write_key(key: Key, indent: str) -> Iterator[str]:
    """Yield the comments of a key that is not set: its text, and a line that sets its default once the # is removed."""
    if key.inner:
        yield from write_prose(key.text, indent)
        # An empty section has no effect, so its name needs no #, and each line inside it works once its own # is removed.
        yield f"{indent}{key.short_name}:"
        for inner in key.inner:
            yield from _write_key(inner, f"{indent}  ")
        return
    yield from write_prose(f"{key.text} Values: {', '.join(key.values)}.", indent)
    yield f"{indent}#{key.short_name}: {key.default}"


def write_prose(text: str, indent: str) -> Iterable[str]:
    """Return a sentence as lines of comments."""
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
        for line in write_prose(f"{key.text} Values: {', '.join(key.values)}.", ""):
            yield f"#       {line.removeprefix('# ')}\n"
