"""Read chains: recipes with `stages:`. Each stage continues from the one before, or exports it. Never imports torch.

The keys outside `stages:` hold for every stage that trains, and a stage may override them. A stage may also name a recipe file.
Precedence, lowest first: the recipe file that a stage names, the keys outside `stages:`, the keys of the stage, `--set`.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.check.adoption import adopt_earlier_run, adopt_form, read_stage_form
from finetune.check.chain_stages import Chain, Content, ExportStage, Stage, SynthesizeStage, TrainStage
from finetune.check.chaining.chain_problems import join_equal, list_export_problems, list_following_problems
from finetune.check.chaining.chain_synthesis import (
    WRITING_KEYS,
    add_run_endpoint,
    find_written_rows,
    list_foreign_keys,
    use_written_rows,
)
from finetune.check.data_section import find_file
from finetune.check.recipes import list_problems, resolve_draft, resolve_names, settle_recipe
from finetune.errors import ExportError, FinetuneError, RecipeError, describe_unknown_name
from finetune.files.folders import expand_home
from finetune.files.resources import find_recipe, list_templates
from finetune.files.sizes import parse_size
from finetune.recipe.methods import DEFAULT_METHOD, METHODS
from finetune.recipe.recipe_file import (
    Draft,
    apply_override,
    apply_overrides,
    draft_recipe,
    expand_shorthand,
    list_keys,
    read_section,
)
from finetune.recipe.sections import Recipe
from finetune.recipe.yaml_loader import load_recipe_file
from finetune.runs.export_settings import ExportSettings
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import open_result

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OWN_KEYS = ("name", "recipe", "export")


def load_chain(source: Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a chain or a plain recipe, check every stage, and return it with absolute paths.

    `stages.NAME.section.key=value` overrides a key of one stage, `section.key=value` that of every stage that trains.
    `model.checkpoint=value` overrides only the first stage, because the others continue from it.

    Raises:
        RecipeError: with every problem of every stage.
    """
    file = find_recipe(source)
    content = load_recipe_file(file)
    if "stages" in content:
        return _ChainReader(source, file, content, overrides).read()
    resolved = resolve_draft(draft_recipe(file, content, overrides), str(source))
    return Chain(file, resolved.output, (TrainStage("", resolved, None),))


def resolve_stage(stage: TrainStage) -> ResolvedRecipe:
    """Return the recipe for running a stage, after the run that it continues from has finished.

    Raises:
        RecipeError: the stage cannot continue from that run.
    """
    if stage.follows is None:
        return stage.resolved
    earlier = open_result(stage.follows)
    # Its own keys were compared with the stage before when the chain was read.
    draft = adopt_earlier_run(Draft(stage.follows, stage.run_recipe, (), stage.resolved.given), earlier, ())
    if draft.problems:
        raise RecipeError(stage.name, list(draft.problems))
    return resolve_names(draft.recipe, earlier, draft.given)


class _ChainReader:
    """Builds the stages of a chain and collects their problems."""

    def __init__(self, source: Path, file: Path, content: Content, overrides: Sequence[str]) -> None:
        self._source, self._file, self._content = source, file, content
        self._problems: list[str] = []
        self._overrides = [override for override in overrides if not override.startswith(("output=", "stages."))]
        self._own = [override.removeprefix("stages.") for override in overrides if override.startswith("stages.")]
        for override in overrides:
            if override.startswith("output="):
                apply_override(self._content, override, self._problems)
        output = self._content.pop("output", None) or Path("runs", self._file.stem)
        self._output = expand_home(str(output)).resolve()
        self._items = self._content.pop("stages")

    def read(self) -> Chain:
        stages: list[Stage] = []
        for name, item in self._list_stages():
            start = len(self._problems)
            before = [stage for stage in stages if isinstance(stage, TrainStage)]
            stage = self._read_stage(name, item, before, stages[-1] if stages else None)
            self._problems[start:] = [f"{name}: {problem}" for problem in self._problems[start:]]
            stages.append(stage)
        names = [stage.name for stage in stages]
        for override in self._own:
            if not override.partition("=")[0].partition(".")[2] or "=" not in override:
                self._problems.append(f"--set stages.{override}: must read stages.NAME.section.key=value")
                continue
            if override.partition(".")[0] not in names:
                name = override.partition(".")[0]
                self._problems.append(
                    f"--set stages.{override}: the stage {name!r} is {describe_unknown_name(name, names)}"
                )
        if not any(isinstance(stage, TrainStage) for stage in stages) and not self._problems:
            self._problems.append("stages: no stage trains; add one without export")
        if self._problems:
            raise RecipeError(str(self._source), join_equal(self._problems, names))
        return Chain(self._file, self._output, tuple(stages))

    def _read_stage(self, name: str, item: Content, before: Sequence[TrainStage], last: Stage | None) -> Stage:
        if "export" in item:
            return self._read_export(name, item, before)
        if "synthesize" in item:
            return self._read_synthesis(name, item, before)
        return self._read_training(name, item, before, find_written_rows(last))

    def _read_synthesis(self, name: str, item: Content, before: Sequence[TrainStage]) -> Stage:
        """Read a stage that writes rows; what it shares with the stages that train is the section data, endpoints and seed."""
        content = copy.deepcopy({key: value for key, value in self._content.items() if key in WRITING_KEYS})
        _merge(content, {key: value for key, value in item.items() if key not in _OWN_KEYS})
        self._override(name, content, ())
        self._problems += list_foreign_keys(content)
        if not before:
            self._problems.append("synthesize: no stage before it trains; use `finetune synthesize` for other models")
            return ExportStage(name, ExportSettings(), self._output, self._output / name)
        first, run = before[0], Path(before[-1].recipe.output)
        add_run_endpoint(content, first.recipe.model.checkpoint)
        content["model"] = {"checkpoint": first.recipe.model.checkpoint}
        problems: list[str] = []
        recipe = read_section(Recipe, content, "", problems)
        draft = Draft(self._file, recipe, tuple(problems), frozenset(list_keys(content)))
        try:
            resolved = self._resolve_later(draft, first)
        except RecipeError as error:
            self._problems += error.problems
            resolved = ResolvedRecipe(recipe, DEFAULT_METHOD)
        return SynthesizeStage(name, resolved, run, self._output / name)

    def _list_stages(self) -> list[tuple[str, Content]]:
        """Return the stages that are mappings with a valid name, and add a problem for every other."""
        if not isinstance(self._items, list) or not self._items:
            self._problems.append("stages: must be a list of stages, each with a name")
            return []
        found: list[tuple[str, Content]] = []
        for number, item in enumerate(self._items, 1):
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self._problems.append(
                    f"stages[{number}]: needs a name of letters, digits, - and _, which also names its folder; found {name!r}"
                )
            elif name in [other for other, _ in found]:
                self._problems.append(f"stages[{number}]: the name {name} stands twice; give every stage its own")
            else:
                found.append((name, copy.deepcopy(item)))
        return found

    def _read_export(self, name: str, item: Content, before: Sequence[TrainStage]) -> ExportStage:
        self._override(name, item, ())
        for key in item:
            if key not in ("name", "export"):
                self._problems.append(f"{key}: does not belong to a stage that exports; remove it")
        options = item["export"] or {}
        if not isinstance(options, dict):
            self._problems.append("export: must be a section of keys and values, such as {dtype: bfloat16}")
            options = {}
        try:
            settings = read_section(ExportSettings, options, "export.", self._problems)
        except ExportError as error:  # of the types only: they have reasons of their own
            self._problems.append(f"export.gguf: {error}")
            settings = ExportSettings()
        if before:
            self._problems += list_export_problems(settings, before[-1].resolved)
        else:
            self._problems.append(
                "export: no stage before it trains, so there is nothing to export; move it behind one"
            )
        try:
            parse_size(settings.max_shard_size, "export.max_shard_size")
        except FinetuneError as error:
            self._problems.append(str(error))
        run = Path(before[-1].recipe.output) if before else self._output
        return ExportStage(name, settings, run, self._output / name)

    def _read_training(self, name: str, item: Content, before: Sequence[TrainStage], rows: Path | None) -> TrainStage:
        content = self._read_named_recipe(item)
        _merge(content, copy.deepcopy(self._content))
        _merge(content, {key: value for key, value in item.items() if key not in _OWN_KEYS})
        names_checkpoint = isinstance(item.get("model"), dict) and "checkpoint" in item["model"]
        if before and names_checkpoint:
            self._problems.append("model.checkpoint: this stage continues from the stage before; remove this key")
        if rows is not None:
            self._problems += use_written_rows(content, item)
        if "output" in item:
            self._problems.append(f"output: a stage writes to the folder {name} in the chain's output; remove this key")
        shared = [text for text in self._overrides if not (before and text.startswith("model.checkpoint="))]
        self._override(name, content, shared)
        if before:
            # Checks, plans and previews work before the run that this stage continues from exists. They use the base
            # checkpoint of the first stage.
            _merge(content, {"model": {"checkpoint": before[0].recipe.model.checkpoint}})
        content["output"] = str(self._output / name)
        problems: list[str] = []
        recipe = read_section(Recipe, content, "", problems)
        given = frozenset(list_keys(content))
        # Only the keys of the stage itself can contradict the adapter that it continues, not those that all stages share.
        own = frozenset(list_keys(item)) | {text.partition("=")[0] for text in self._list_own_overrides(name)}
        follows = before[-1] if before else None
        if follows is not None:
            recipe = self._adopt(recipe, follows.recipe, given, own)
        draft = Draft(self._file, recipe, tuple(problems), given)
        try:
            resolved = resolve_draft(draft, name) if follows is None else self._resolve_later(draft, before[0])
        except RecipeError as error:
            self._problems += error.problems
            return TrainStage(name, ResolvedRecipe(recipe, METHODS.get(recipe.method, DEFAULT_METHOD)), None)
        if follows is None:
            return TrainStage(name, resolved, None)
        self._problems += list_following_problems(resolved, follows.resolved)
        continues = not follows.resolved.trains_all_weights
        return TrainStage(name, replace(resolved, awaits_adapter=continues), follows.resolved.output, rows)

    def _resolve_later(self, draft: Draft, first: TrainStage) -> ResolvedRecipe:
        """Resolve a later stage; the run that the first stage continues stands for the stage before, which has not run yet."""
        earlier = first.resolved.earlier
        if problems := list_problems(draft, None):
            raise RecipeError(str(self._source), problems)
        return resolve_names(settle_recipe(draft), earlier, draft.given)

    def _adopt(self, recipe: Recipe, earlier: Recipe, given: frozenset[str], own: frozenset[str]) -> Recipe:
        """Return a later stage's recipe with the settings of the adapter that it continues."""
        if earlier.adapter.trains_all_weights:
            return recipe
        recipe, problems = adopt_form(recipe, read_stage_form(earlier), "the stage before", given, own)
        self._problems += problems
        return recipe

    def _list_own_overrides(self, name: str) -> list[str]:
        return [text.removeprefix(f"{name}.") for text in self._own if text.startswith(f"{name}.")]

    def _override(self, name: str, content: Content, shared: Sequence[str]) -> None:
        apply_overrides(content, (*shared, *self._list_own_overrides(name)), self._problems, self._file)

    def _read_named_recipe(self, item: Content) -> Content:
        """Return the content of the recipe file that a stage names; paths in it are relative to that file."""
        if "recipe" not in item:
            return {}
        path = find_file(str(item["recipe"]), self._file.parent) or find_recipe(Path(str(item["recipe"])))
        try:
            content = load_recipe_file(path)
        except RecipeError as error:
            self._problems += [f"recipe: {item['recipe']}: {problem}" for problem in error.problems]
            return {}
        if "stages" in content:
            self._problems.append(f"recipe: {item['recipe']} is itself a chain; name a recipe of one run")
            return {}
        content.pop("output", None)
        data = content.get("data")
        if isinstance(data, dict):
            for key in {"train", "eval", "sources"} & set(data):
                data[key] = _find_sources(data[key], path.parent)
            if "template" in data and data["template"] not in ("auto", *list_templates()):
                data["template"] = _find_sources(data["template"], path.parent)
        return content


def _find_sources(value: Any, folder: Path) -> Any:
    """Return sources of rows with absolute paths, found in the recipe's folder first; a path that does not exist is kept."""
    if isinstance(value, str):
        return str(find_file(value, folder) or value)
    if isinstance(value, list):
        return [_find_sources(item, folder) for item in value]
    if isinstance(value, dict):  # names with their sources, or one source as a mapping
        paths = {key for key in value if key == "path" or ("path" not in value and "hub" not in value)}
        return {key: _find_sources(item, folder) if key in paths else item for key, item in value.items()}
    return value


def _merge(content: Content, changes: Content) -> None:
    """Override keys of a recipe's content: sections key by key, all other values whole."""
    expand_shorthand(content)
    expand_shorthand(changes)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = {**content[key], **value}
        else:
            content[key] = value
