"""Render the page of all keys, docs/keys.md, from the tables that the kit itself uses."""

from collections.abc import Iterable, Iterator, Mapping

from finetune.data.formats.row_formats import FORMATS, SHAPES
from finetune.guide.recipe_keys import (
    Key,
    list_chain_keys,
    list_endpoint_keys,
    list_export_keys,
    list_recipe_keys,
    list_source_keys,
    list_task_keys,
    walk_keys,
)
from finetune.recipe.methods import METHODS, Method
from finetune.rewards.rules import RULES

_HEAD = """# Every key of a recipe

`finetune recipes --keys` makes this page. `finetune recipes sft_qlora -o my.yaml` copies a shipped recipe with every other key
as a comment. On the command line `-s section.key=value` sets a key. The kit refuses unknown, repeated and misspelt keys and
values of the wrong type before it loads anything. It looks for a file that a recipe names beside the recipe first, then in the
current folder. A path that `-s` gives is looked for in the current folder first; with a shipped recipe, only there.
"""
_TRAINER = """The section also takes any option of the class in this table, under its own name; the kit checks it against the installed
version. The table shows the kit's own defaults. In addition `gradient_checkpointing` is true. With rows to evaluate on,
`eval_strategy` is `epoch`, and `per_device_eval_batch_size` is the micro-batch size of the training.
"""
_OWNED = """A recipe may not set these options, because the kit sets them:
"""


def render_key_guide() -> str:
    """Return the whole page in Markdown."""
    return "\n".join(_list_parts())


def _list_parts() -> Iterator[str]:
    keys = list_recipe_keys()
    yield _HEAD
    yield from _render_section("The recipe itself", "", [key for key in keys if not key.inner])
    for key in keys:
        if not key.inner:
            continue
        inner = [deeper for own in key.inner for deeper in (own, *own.inner)]
        yield from _render_section(f"`{key.name}`", key.text, inner)
        if key.name == "data":
            yield from _render_section("A source of rows as a mapping", "", list_source_keys())
            yield from _render_section("A task of `data.tasks`", "", list_task_keys())
            yield from _render_formats()
        elif key.name == "rewards":
            yield from _render_rules()
        elif key.name == "trainer":
            yield from _render_trainer()
    yield from _render_section("An entry of `endpoints`", "", list_endpoint_keys())
    (stages,) = list_chain_keys()
    yield from _render_section("`stages`: a chain", stages.text, stages.inner)
    yield from _render_section("`export` of a stage", "", list_export_keys())


def _render_section(title: str, text: str, keys: Iterable[Key]) -> Iterator[str]:
    yield f"## {title}\n"
    if text:
        yield f"{text}\n"
    cells = [(f"`{key.name}`", _quote(key.default), _join_values(key), key.text) for key in keys]
    yield _render_table(("key", "default", "values", "what it does"), cells)


def _join_values(key: Key) -> str:
    return ", ".join(key.values) if key.values else "a section of keys and values"


def _render_formats() -> Iterator[str]:
    yield "### Formats of rows\n"
    cells = [
        (
            f"`{entry.name}`",
            ", ".join(f"`{key}`" for key in entry.required),
            ", ".join(f"`{name}`" for name, method in METHODS.items() if entry.row_kind in SHAPES[method.shape]),
        )
        for entry in FORMATS.values()
    ]
    yield _render_table(("format", "keys that a row must have", "methods"), cells)


def _render_rules() -> Iterator[str]:
    yield "### Rules\n"
    yield "A rule gives an answer a value from 0 to 1, and a penalty gives one from -1 to 0. The value is multiplied by the rule's weight.\n"
    cells = [(f"`{rule.name}`", rule.description) for rule in RULES.values()]
    yield _render_table(("rule", "what it rewards or penalises"), cells)


def _render_trainer() -> Iterator[str]:
    yield _TRAINER
    cells = [(f"`{name}`", f"`{method.config_class}`", _write_defaults(method)) for name, method in METHODS.items()]
    yield _render_table(("method", "options of", "defaults of the kit"), cells)
    yield _OWNED
    yield _render_table(("option", "what to do instead", "methods"), _list_owned())


def _write_defaults(method: Method) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in method.defaults.items())


def _list_owned() -> Iterator[tuple[str, str, str]]:
    methods: dict[tuple[str, str], list[str]] = {}
    for name, method in METHODS.items():
        for option, reason in method.owned.items():
            methods.setdefault((option, reason), []).append(name)
    options: dict[tuple[str, str], list[str]] = {}
    for (option, reason), names in methods.items():
        where = "all" if len(names) == len(METHODS) else ", ".join(names)
        options.setdefault((reason, where), []).append(f"`{option}`")
    for (reason, where), found in options.items():
        yield ", ".join(found), reason, where


def _quote(text: str) -> str:
    return f"`{text}`" if text else ""


def _render_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(map(_escape, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape(cell: str) -> str:
    """Escape the characters that Markdown would interpret; between backticks only `|` needs it."""
    texts = cell.replace("|", "\\|").split("`")
    texts[::2] = (text.replace("<", "\\<").replace("*", "\\*") for text in texts[::2])
    return "`".join(texts)


def list_keys_as_json() -> list[Mapping[str, object]]:
    """Return every key with its default, its values and its text."""
    sections = (
        list_recipe_keys(),
        list_source_keys(),
        list_task_keys(),
        list_endpoint_keys(),
        list_chain_keys(),
        list_export_keys(),
    )
    return [
        {"key": key.name, "default": key.default, "values": list(key.values), "text": key.text}
        for keys in sections
        for key in walk_keys(keys)
    ]
