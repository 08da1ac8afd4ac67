"""Read chains: a recipe with `stages:`, each trained on from the one before, or exported. Never imports torch.

What stands at the top of the file holds for every stage; a stage says what differs, or names a recipe file and what differs from
that. Precedence: the recipe file that a stage names, the top of the chain, the stage, then `--set`.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.check.chain_stages import Chain, Content, ExportSection, ExportStage, Stage, TrainStage
from finetune.check.data_section import find_file
from finetune.check.preference_methods import check_early_reference
from finetune.check.recipes import list_problems, resolve_recipe
from finetune.errors import FinetuneError, RecipeError, describe_unknown_name
from finetune.files.resources import find_recipe, list_templates
from finetune.files.sizes import parse_size
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import Draft, apply_override, apply_overrides, expand_shorthand, read_section
from finetune.recipe.sections import Recipe
from finetune.recipe.yaml_loader import load_recipe_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# What an adapter and its base keep when training goes on with them.
_ADOPTED = {
    "adapter": ("kind", "rank", "alpha", "rslora", "dora", "train_tokens", "targets"),
    "model": ("quantize", "architecture"),
}
_OWN_KEYS = ("name", "recipe", "export")


def is_chain(source: Path) -> bool:
    """Tell whether a recipe file has stages; a file that cannot be read has none, and says why when it is loaded."""
    try:
        return "stages" in load_recipe_file(find_recipe(source))
    except RecipeError:
        return False


def load_chain(source: Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a chain, check every stage of it, and return it with every path made absolute.

    `stages.NAME.section.key=value` overrides one stage, `section.key=value` every stage that trains; the start is the first's.

    Raises:
        RecipeError: with every problem of every stage.
    """
    return _ChainReader(source, overrides).read()


class _ChainReader:
    """Collects the problems of a chain while its stages are put together."""

    def __init__(self, source: Path, overrides: Sequence[str]) -> None:
        self._source = source
        self._file = find_recipe(source)
        self._content = load_recipe_file(self._file)
        self._problems: list[str] = []
        self._overrides = [override for override in overrides if not override.startswith(("output=", "stages."))]
        self._own = [override.removeprefix("stages.") for override in overrides if override.startswith("stages.")]
        for override in overrides:
            if override.startswith("output="):
                apply_override(self._content, override, self._problems)
        output = self._content.pop("output", None) or Path("runs", self._file.stem)
        self._output = Path(str(output)).expanduser().resolve()
        self._items = self._content.pop("stages")

    def read(self) -> Chain:
        stages: list[Stage] = []
        for name, item in self._list_stages():
            start = len(self._problems)
            before = [stage for stage in stages if isinstance(stage, TrainStage)]
            stage = (
                self._read_export(name, item, before) if "export" in item else self._read_training(name, item, before)
            )
            self._problems[start:] = [f"{name}: {problem}" for problem in self._problems[start:]]
            stages.append(stage)
        names = [stage.name for stage in stages]
        for override in self._own:
            if override.partition(".")[0] not in names:
                name = override.partition(".")[0]
                self._problems.append(
                    f"--set stages.{override}: the stage {name!r} is {describe_unknown_name(name, names)}"
                )
        if not any(isinstance(stage, TrainStage) for stage in stages) and not self._problems:
            self._problems.append("stages: none of them trains")
        if self._problems:
            raise RecipeError(str(self._source), self._problems)
        return Chain(self._file, self._output, tuple(stages))

    def _list_stages(self) -> list[tuple[str, Content]]:
        """Return the stages that are mappings with a usable name; the others become problems."""
        if not isinstance(self._items, list) or not self._items:
            self._problems.append("stages: must be a list of stages, each with a name")
            return []
        found: list[tuple[str, Content]] = []
        for number, item in enumerate(self._items, 1):
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self._problems.append(
                    f"stages[{number}]: needs a name of letters, digits, - and _, which becomes its folder; found {name!r}"
                )
            elif name in [other for other, _ in found]:
                self._problems.append(f"stages[{number}]: the name {name} stands twice")
            else:
                found.append((name, copy.deepcopy(item)))
        return found

    def _read_export(self, name: str, item: Content, before: Sequence[TrainStage]) -> ExportStage:
        self._override(name, item, ())
        for key in item:
            if key not in ("name", "export"):
                self._problems.append(f"{key}: does not belong to a stage that exports")
        options = item["export"] or {}
        if not isinstance(options, dict):
            self._problems.append("export: must be a section of keys and values, such as {dtype: bfloat16}")
            options = {}
        settings = read_section(ExportSection, options, "export.", self._problems)
        if before:
            self._problems += _list_export_problems(settings, before[-1].recipe)
        else:
            self._problems.append("export: no stage before it trains, so there is nothing to export")
        try:
            parse_size(settings.max_shard_size)
        except FinetuneError as error:
            self._problems.append(str(error).replace("--max-shard-size", "export.max_shard_size"))
        run = Path(before[-1].recipe.output) if before else self._output
        return ExportStage(name, settings, run, self._output / name)

    def _read_training(self, name: str, item: Content, before: Sequence[TrainStage]) -> TrainStage:
        content = self._read_named_recipe(item)
        _merge(content, copy.deepcopy(self._content))
        _merge(content, {key: value for key, value in item.items() if key not in _OWN_KEYS})
        own_start = isinstance(item.get("model"), dict) and "checkpoint" in item["model"]
        if before and own_start:
            self._problems.append("model.checkpoint: goes on from the stage before; remove it")
        if "output" in item:
            self._problems.append(f"output: is the folder {name} in the chain's own output; remove it")
        shared = [text for text in self._overrides if not (before and text.startswith("model.checkpoint="))]
        self._override(name, content, shared)
        if before:
            # For the checks, and for a plan or a preview before the run before is there: the start of all.
            _merge(content, {"model": {"checkpoint": before[0].recipe.model.checkpoint}})
        content["output"] = str(self._output / name)
        problems: list[str] = []
        draft = Draft(self._file, read_section(Recipe, content, "", problems), tuple(problems))
        if found := list_problems(draft):
            self._problems += found
            return TrainStage(name, draft.recipe, None)
        recipe = resolve_recipe(draft)
        if not before:
            return TrainStage(name, recipe, None)
        recipe = self._adopt(recipe, before[-1].recipe, item)
        self._problems += _list_following_problems(recipe, before[-1].recipe)
        goes_on = before[-1].recipe.adapter.kind != "none"
        return TrainStage(name, recipe, Path(before[-1].recipe.output), goes_on)

    def _adopt(self, recipe: Recipe, earlier: Recipe, item: Content) -> Recipe:
        """Return a later stage's recipe with the form of the adapter that it goes on with; the stage itself may not change it."""
        if earlier.adapter.kind == "none":
            return recipe
        for section, names in _ADOPTED.items():
            own, kept = item.get(section), {name: getattr(vars(earlier)[section], name) for name in names}
            for name in names:
                if isinstance(own, dict) and name in own and getattr(vars(recipe)[section], name) != kept[name]:
                    self._problems.append(
                        f"{section}.{name}: the adapter of the stage before goes on as it is; remove it"
                    )
            recipe = replace(recipe, **{section: replace(vars(recipe)[section], **kept)})
        return replace(recipe, adapter=replace(recipe.adapter, init="default"))

    def _override(self, name: str, content: Content, shared: Sequence[str]) -> None:
        own = [text.removeprefix(f"{name}.") for text in self._own if text.startswith(f"{name}.")]
        apply_overrides(content, (*shared, *own), self._problems)

    def _read_named_recipe(self, item: Content) -> Content:
        """Return what the recipe file of a stage says, its data found beside that file."""
        if "recipe" not in item:
            return {}
        path = find_file(str(item["recipe"]), self._file.parent) or find_recipe(Path(str(item["recipe"])))
        try:
            content = load_recipe_file(path)
        except RecipeError as error:
            self._problems += [f"recipe: {item['recipe']}: {problem}" for problem in error.problems]
            return {}
        content.pop("output", None)
        data = content.get("data")
        if isinstance(data, dict):
            for key in {"train", "eval", "sources"} & set(data):
                data[key] = _find_sources(data[key], path.parent)
            if "template" in data and data["template"] not in ("auto", *list_templates()):
                data["template"] = _find_sources(data["template"], path.parent)
        return content


def _list_following_problems(recipe: Recipe, earlier: Recipe) -> Iterator[str]:
    """Yield why a stage cannot go on from the one before, which would show only when that has been trained."""
    method = METHODS[recipe.method]
    if METHODS[earlier.method].head == "score" != method.head:
        yield f"method: the stage before trains a reward model, which cannot speak; {recipe.method} needs a language model"
    if earlier.adapter.kind != "none":
        yield from check_early_reference(recipe, method)


def _list_export_problems(settings: ExportSection, earlier: Recipe) -> Iterator[str]:
    """Yield why the stage before cannot be exported so, which would show only when that has been trained."""
    if METHODS[earlier.method].head == "score":
        yield "export: the stage before trains a reward model, and an export is a Llama that speaks; remove this stage"
    if settings.base == "dequantized" and earlier.model.quantize == "none":
        yield "export.base: dequantized is for adapters of quantized stages; set full"
    if settings.base == "auto" and not settings.verify and earlier.model.quantize != "none":
        yield "export.base: auto chooses by measuring, which verify: false leaves out; remove one of the two"


def _find_sources(value: Any, folder: Path) -> Any:
    """Return what a recipe says of its rows with every path that is there made absolute, the recipe's folder looked in first."""
    if isinstance(value, str):
        return str(find_file(value, folder) or value)
    if isinstance(value, list):
        return [_find_sources(item, folder) for item in value]
    if isinstance(value, dict):  # names with their sources, or one source and how much of it
        paths = {key for key in value if key == "path" or ("path" not in value and "hub" not in value)}
        return {key: _find_sources(item, folder) if key in paths else item for key, item in value.items()}
    return value


def _merge(content: Content, changes: Content) -> None:
    """Lay one recipe's keys over another's: sections key by key, everything else whole."""
    expand_shorthand(content)
    expand_shorthand(changes)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = {**content[key], **value}
        else:
            content[key] = value
