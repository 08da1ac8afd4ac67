"""List what a recipe takes from the hub, and record the commit of each, so that a run can go on when a branch has moved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.checkpoints.finding import find_repository
from finetune.files.json_files import read_json
from finetune.hub.commits import find_commit, record_commits
from finetune.hub.faults import Asked
from finetune.recipe.sections import Recipe, SourceSection


def record_hub(recipe: Recipe) -> list[dict[str, str | None]]:
    """Return the commits of the base checkpoint and the data sets that a recipe takes from the hub."""
    base = find_repository(recipe.model.checkpoint)
    return record_commits([*([base] if base is not None else []), *_list_datasets(recipe)])


def read_hub_record(record_file: Path) -> list[dict[str, Any]]:
    """Return the commits that a run began with; a run of before they were recorded has none."""
    record = read_json(record_file)
    found = record.get("hub") if isinstance(record, dict) else None
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def name_datasets(recipe: Recipe) -> tuple[str, ...]:
    """Return the data sets of the hub that a recipe trains on, with their commits where they are known."""
    names = ((asked, find_commit(asked) or asked.revision) for asked in dict.fromkeys(_list_datasets(recipe)))
    return tuple(f"{asked.repository}@{commit}" if commit else asked.repository for asked, commit in names)


def _list_datasets(recipe: Recipe) -> Iterator[Asked]:
    for source in (*recipe.data.train, *recipe.data.sources.values(), *recipe.data.eval):
        if isinstance(source, SourceSection) and source.hub:
            yield Asked(source.hub, source.revision, "dataset")
