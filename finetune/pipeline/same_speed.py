"""Let runs that are compared train in the same ways of `model.speed: auto`, and say how they train.

Each run alone would ask its own clock, and two could then differ by rounding because the machine was busy.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from finetune.runs.resuming import read_speed


def join_choices(runs: Iterable[Path]) -> frozenset[str] | None:
    """Return the ways that runs train with, or None where none of them has chosen yet.

    The first one decides, and none uses more, so all together are the choice of the first.

    Raises:
        FinetuneError: a record is damaged.
    """
    chosen = [choice.ways for run in runs if (choice := read_speed(run)) is not None]
    return frozenset().union(*chosen) if chosen else None


def describe_choices(runs: Mapping[str, Path], what: str = "runs") -> tuple[str, ...]:
    """Say by their names which ways runs train with; say nothing where none has tried any."""
    choices = {name: read_speed(run) for name, run in runs.items()}
    if not any(choices.values()):
        return ()
    groups: dict[str, list[str]] = {}
    for name, choice in choices.items():
        how = f"with {' and '.join(choice.ways)}" if choice is not None and choice.ways else "as without it"
        groups.setdefault(how, []).append(name)
    if len(groups) == 1:
        return (f"model.speed: all {what} train {next(iter(groups))}, as the first of them chose",)
    # A name may hold commas.
    parts = ". ".join(f"{how.capitalize()}: {'; '.join(names)}" for how, names in groups.items())
    return (f"model.speed: not all {what} train the same way, so their losses may differ by rounding. {parts}",)
