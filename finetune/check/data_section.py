"""Check the section `data` of a recipe, and find the files that it names."""

import difflib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune.check.trainer.option_values import MOST_PROCESSES
from finetune.checkpoints.checkpoint_table import is_hub_id
from finetune.data.formats.row_formats import FORMATS
from finetune.data.reading.patterns import expand_pattern, has_signs
from finetune.errors import describe_unknown_name
from finetune.evaluation.tasks.task_names import (
    EXEMPLAR_ENDINGS,
    ROW_ENDINGS,
    TASKS,
    describe_unknown_task,
    describe_wanted,
    find_in_folder,
)
from finetune.files.folders import expand_home
from finetune.files.resources import list_templates
from finetune.mixtures.matched import list_unknown_sources
from finetune.mixtures.published import describe_unknown_mixture, find_mixture
from finetune.recipe.sections import DataSection, SourceSection, TaskSection

_SHORTEST_ROW = 8


def check_data_section(data: DataSection, folder: Path) -> Iterator[str]:
    """Yield the problems of the section; files are looked for in `folder`, that of the recipe, first."""
    if data.mixture is not None or data.sources:
        yield from _check_mixture(data, folder)
    elif not data.train:
        yield "data.train: is missing; name at least one data file"
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for number, source in enumerate(sources, 1):
            if isinstance(source, SourceSection):
                yield from _check_source(source, f"data.{key}[{number}]", folder)
            elif find_file(source, folder) is None:
                yield f"data.{key}: {source} does not exist{_suggest_file(source, folder)}"
    yield from _list_unreadable(data, folder)
    yield from _check_tasks(data, folder)
    if data.format != "auto" and data.format not in FORMATS:
        yield f"data.format: {data.format!r} is {describe_unknown_name(data.format, ['auto', *FORMATS])}"
    yield from _check_template(data.template, folder)
    if data.eval and data.held_out:
        yield "data.held_out: data.eval names rows to evaluate on already; remove one of the two"
    if data.held_out < 0 or (isinstance(data.held_out, float) and data.held_out >= 1):
        yield f"data.held_out: must be a share below 1 (such as 0.05) or a whole number of rows; found {data.held_out}"
    if data.max_tokens < _SHORTEST_ROW:
        yield f"data.max_tokens: must be at least {_SHORTEST_ROW}; found {data.max_tokens}"
    if not _is_text_encoding(data.encoding):
        yield f"data.encoding: {data.encoding!r} is no encoding that Python knows; name one such as gb18030 or utf-16"
    if data.workers < 1:
        yield f"data.workers: must be at least 1; found {data.workers}"
    if data.workers > MOST_PROCESSES:
        yield f"data.workers: must be at most {MOST_PROCESSES:,}; found {data.workers}"


def _check_tasks(data: DataSection, folder: Path) -> Iterator[str]:
    tasks = [as_task(task) for task in data.tasks]
    for number, task in enumerate(tasks, 1):
        key = f"data.tasks[{number}]"
        if task.name not in TASKS:
            yield f"{key}.name: {task.name!r} is {describe_unknown_task(task.name)}"
        if task.name in [earlier.name for earlier in tasks[: number - 1]]:
            yield f"{key}.name: {task.name} is named twice; its scores would have one name"
        if task.limit is not None and task.limit < 1:
            yield f"{key}.limit: must be at least 1, or null for all rows; found {task.limit}"
        if task.every is not None and not 0 < task.every <= 1:
            yield f"{key}.every: must be a share of the run's steps above 0, at most 1; found {task.every:g}"
        for name, file in (("path", task.path), ("exemplars", task.exemplars)):
            if file and find_file(file, folder) is None:
                yield f"{key}.{name}: {file} does not exist{_suggest_file(file, folder)}"
        yield from _check_task_folders(task, key, folder)


def _check_task_folders(task: TaskSection, key: str, folder: Path) -> Iterator[str]:
    """Yield a problem for each folder that is named for a task and holds no file of it."""
    row = TASKS.get(task.name)
    for name, file, endings in (("path", task.path, ROW_ENDINGS), ("exemplars", task.exemplars, EXEMPLAR_ENDINGS)):
        found = find_file(file, folder) if file else None
        if row is None or found is None or not found.is_dir() or (name == "exemplars" and row.shots is None):
            continue
        if find_in_folder(row, found, endings) is None:
            yield f"{key}.{name}: {file} {describe_wanted(row, endings)}"


def describe_task_sources(data: DataSection) -> Iterator[str]:
    """Yield a sentence for each task whose rows or exemplars come from the hub, because the recipe names no file of them."""
    for number, task in enumerate(map(as_task, data.tasks), 1):
        row = TASKS[task.name]
        absent = ["path"] * (not task.path) + ["exemplars"] * (not task.exemplars and row.shots is not None)
        if absent:
            parts = {
                "path": "the rows",
                "exemplars": f"the {row.shots.count if row.shots else 0} exemplars of each prompt",
            }
            what = " and ".join(parts[name] for name in absent)
            yield f"data.tasks[{number}]: {what} of {task.name} are read from the hub ({row.hub.name}); {' and '.join(absent)} would name files"


def as_task(task: str | TaskSection) -> TaskSection:
    """Return a task that is written as its name alone as a section."""
    return TaskSection(task) if isinstance(task, str) else task


def resolve_task(task: str | TaskSection, folder: Path) -> TaskSection:
    """Return a task with absolute paths."""
    section = as_task(task)
    path, exemplars = (str(find_file(file, folder)) if file else "" for file in (section.path, section.exemplars))
    return replace(section, path=path, exemplars=exemplars)


def _list_unreadable(data: DataSection, folder: Path) -> Iterator[str]:
    """Yield a problem for each file that the recipe names and this user may not read."""
    named = [(f"data.{key}", source) for key in ("train", "eval") for source in getattr(data, key)]
    for key, source in (*named, *((f"data.sources.{name}", source) for name, source in data.sources.items())):
        path = source.path if isinstance(source, SourceSection) else source
        file = find_file(path, folder) if path else None
        if file is not None and file.exists() and not os.access(file, os.R_OK):
            yield f"{key}: {path} cannot be read: Permission denied"


def _check_mixture(data: DataSection, folder: Path) -> Iterator[str]:
    if data.train:
        yield "data.train: data.mixture and data.sources name the rows to train on already; remove one or the other"
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if isinstance(source, SourceSection):
            yield from _check_source(source, key, folder)
            if source.weight is not None or source.rows is not None:
                yield f"{key}: takes no weight and no number of rows; data.mixture decides how much of it is taken"
        elif find_file(source, folder) is None:
            yield f"{key}: {source} does not exist{_suggest_file(source, folder)}"
    if data.mixture is None:
        yield "data.mixture: is missing; data.sources needs a published mixture, such as phase25 (`finetune mixtures` lists them)"
        return
    mixture = find_mixture(data.mixture)
    if mixture is None:
        yield f"data.mixture: {data.mixture!r} is {describe_unknown_mixture(data.mixture)}"
    elif not data.sources:
        yield f"data.sources: is missing; give files for names of {mixture.name}, such as {{fineweb-edu: web/*.jsonl, code: mine.parquet}}"
    else:
        yield from (f"data.sources.{name}: {reason}" for name, reason in list_unknown_sources(mixture, data.sources))


def _check_source(source: SourceSection, name: str, folder: Path) -> Iterator[str]:
    if bool(source.path) == bool(source.hub):
        yield f"{name}: needs one of path (files) and hub (a data set's owner/name)"
    elif source.path and find_file(source.path, folder) is None:
        yield f"{name}.path: {source.path} does not exist{_suggest_file(source.path, folder)}"
    elif source.hub and not is_hub_id(source.hub):
        yield f"{name}.hub: must read owner/name; found {source.hub!r}"
    for key in ("config", "split", "revision"):
        if source.path and getattr(source, key) is not None:
            yield f"{name}.{key}: works only for a data set of the hub; remove it, or set hub instead of path"
    if source.weight is not None and source.rows is not None:
        yield f"{name}: takes a weight or a number of rows, not both"
    if source.weight is not None and source.weight <= 0:
        yield f"{name}.weight: must be above 0; found {source.weight}"
    if source.rows is not None and source.rows < 1:
        yield f"{name}.rows: must be at least 1; found {source.rows}"


def _check_template(template: str, folder: Path) -> Iterator[str]:
    if template == "auto" or template in list_templates():
        return
    if template.endswith((".jinja", ".j2")) or "/" in template:
        if find_file(template, folder) is None:
            yield f"data.template: {template} does not exist{_suggest_file(template, folder)}"
        return
    yield f"data.template: {template!r} is {describe_unknown_name(template, ['auto', *list_templates()])}"


def find_file(name: str, folder: Path) -> Path | None:
    """Return the file that a recipe names, or None: looked for in the recipe's folder first, then in the current folder."""
    path = expand_home(name)
    candidates = [path] if path.is_absolute() else [folder / path, path]
    return next((candidate.resolve() for candidate in candidates if _is_data(candidate)), None)


def _is_data(path: Path) -> bool:
    return path.exists() or (has_signs(path) and bool(expand_pattern(path)[1]))


def _is_text_encoding(name: str) -> bool:
    try:
        return isinstance("".encode(name), bytes)
    except (LookupError, ValueError):
        return False


def _suggest_file(name: str, folder: Path) -> str:
    if is_hub_id(name) and not Path(name).suffix:
        return f"; a data set of the hub is written {{hub: {name}}}"
    path = expand_home(name)
    for parent in dict.fromkeys([folder / path.parent, path.parent]):
        if parent.is_dir():
            names = [entry.name for entry in parent.iterdir() if entry.is_file()]
            if matches := difflib.get_close_matches(path.name, names, n=1):
                return f"; {(path.parent / matches[0]).as_posix()} does"
    return f" ({describe_places(folder)})"


def describe_places(folder: Path) -> str:
    """Say where `find_file` has looked: the recipe's folder and the current one, which may be the same."""
    return f"looked in {' and '.join(dict.fromkeys(map(str, (folder.resolve(), Path.cwd()))))}"


def resolve_source(source: str | SourceSection, folder: Path) -> str | SourceSection:
    if isinstance(source, str):
        return str(find_file(source, folder))
    return replace(source, path=str(find_file(source.path, folder))) if source.path else source
