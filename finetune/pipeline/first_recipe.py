"""Write a first recipe for somebody's rows: the method that fits them, sizes that fit the device, a comment for every key."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.check.adoption import FORM_KEYS
from finetune.check.recipes import resolve_draft
from finetune.checkpoints.checkpoint_table import find_alias
from finetune.data.formats.row_formats import choose_format
from finetune.data.formats.rows import RowKind
from finetune.data.reading.sources import read_source
from finetune.data.settings import Source
from finetune.errors import CheckpointError, DataError, MachineError, describe_count
from finetune.files.folders import expand_home, write_new_file
from finetune.files.resources import find_shipped_recipe
from finetune.files.sizes import parse_memory
from finetune.guide.commented_recipe import write_commented
from finetune.models.precision import choose_device
from finetune.planning.forecast import Plan, Target, describe_verdict, find_fitting_plan, find_target
from finetune.planning.hardware import find_card
from finetune.recipe.recipe_file import ACCUMULATION, BATCH, draft_recipe
from finetune.recipe.yaml_loader import load_recipe_file
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import find_earlier
from finetune.training.training_rows import prepare_rows

THIS_MACHINE, CPU = "auto", "cpu"
# Fewer rows are all trained on: a loss on one or two held-out rows says nothing.
_FEWEST_TO_HOLD_OUT = 40
# An epoch should have at least this many optimizer steps, so few rows get a smaller effective batch size.
_STEPS_OF_AN_EPOCH = 20
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 28672)
_UNMEASURED, _ANY_LENGTH = 2048, 2**20
_KNOWS_CHAT = "post-trained"


@dataclass(frozen=True)
class Goal:
    """What can be trained: the shipped recipe whose settings are taken, and a usual base checkpoint."""

    name: str
    recipe: str
    checkpoint: str


GOALS: Mapping[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal("chat", "sft_qlora", "base"),
        Goal("pairs", "dpo_qlora", "instruct"),
        Goal("labels", "kto_qlora", "instruct"),
    )
}
# What the rows of a file are usually for, and what else they can be trained for.
_USES: Mapping[RowKind, tuple[str, ...]] = {
    "conversation": ("chat",),
    "text": ("chat",),
    "tokens": ("chat",),
    "preference": ("pairs", "chat", "labels"),
    "labelled": ("labels", "chat"),
    "prompt": (),
}


@dataclass(frozen=True)
class DataFacts:
    """What a look at a file or folder shows: its rows, the format of the first one, and what it can be trained for."""

    path: Path
    format: str
    rows: int
    goals: tuple[str, ...]


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe that was written; `longest` is in tokens, and None where the tokenizer is not at hand."""

    recipe: Path
    method: str
    checkpoint: str
    format: str
    rows: int
    longest: int | None
    plan: Plan
    notes: tuple[str, ...]


def look_at_data(path: Path) -> DataFacts:
    """Read the rows of a file or folder once.

    Raises:
        DataError: it holds no rows, or rows of no known format.
    """
    count, entry = 0, None
    for _, rows in read_source(Source(path)):
        for place, row in rows:
            if isinstance(row, DataError):
                raise row
            entry = entry or choose_format("auto", {}, row, place)
            count += 1
    if entry is None:
        raise DataError(f"{path}: holds no rows; name a file with at least one")
    return DataFacts(path, entry.name, count, _USES[entry.row_kind])


def choose_goal(facts: DataFacts, wish: str | None) -> Goal:
    """Return what the rows are trained for: what a person wishes, or else what they are usually for.

    Raises:
        DataError: the rows cannot be used for it.
    """
    if not facts.goals:
        raise DataError(
            f"{facts.path}: its rows are prompts without answers; add answers, or start from the recipe of an online method, which "
            "scores the model's own answers: finetune recipes grpo_qlora -o my.yaml"
        )
    goal = wish or facts.goals[0]
    if goal not in facts.goals:
        raise DataError(
            f"{facts.path}: rows of the format {facts.format} cannot be trained for {goal}; they can for {' and '.join(facts.goals)}"
        )
    return GOALS[goal]


def choose_device_target(wish: str) -> Target:
    """Return the device that a person names: `auto` for this machine, `cpu`, the name of a card, or a GPU's memory.

    Raises:
        MachineError: it is none of these.
    """
    if wish == THIS_MACHINE:
        return find_target(choose_device())
    if wish == CPU:
        return find_target(choose_device(use_cpu=True))
    if wish[:1].isdigit() and wish[-1:].lower() == "b":
        return Target(True, parse_memory(wish))
    card = find_card(wish)
    return Target(True, card.memory_bytes, card)


def write_first_recipe(facts: DataFacts, goal: Goal, checkpoint: str, target: Target, output: Path) -> FirstRecipe:
    """Write a recipe that passes the check and that, by its plan, fits the device.

    Raises:
        FinetuneError: the base checkpoint or the rows cannot be used, nothing fits the device, or the file exists.
    """
    content = _start_content(facts, goal, checkpoint, target, output)
    longest, notes = _measure_rows(content, output)
    content["data"]["max_tokens"] = _round_length(_UNMEASURED if longest is None else longest)
    plan = _fit(content, target, output)
    most = content["data"]["max_tokens"]
    if longest is not None and longest > most:
        report = prepare_rows(_resolve(content, output))[1].report
        dropped = sum(split.dropped for split in (report.train, report.evaluation) if split is not None)
        notes += (
            f"{describe_count(dropped, 'row is', 'rows are')} longer than {describe_count(most, 'token')}, the most that fit the device, and left out",
        )
    head = _write_head(facts, checkpoint, plan, output)
    written = {key: value for key, value in content.items() if value != {}}
    write_new_file(output, write_commented(written, head))
    return FirstRecipe(output, content["method"], checkpoint, facts.format, facts.rows, longest, plan, notes)


def _start_content(facts: DataFacts, goal: Goal, checkpoint: str, target: Target, output: Path) -> dict[str, Any]:
    """Return the content of the goal's shipped recipe with the person's rows, checkpoint and device."""
    shipped = load_recipe_file(find_shipped_recipe(Path(goal.recipe)))
    content: dict[str, Any] = {
        **shipped,
        "model": {**shipped["model"], "checkpoint": checkpoint},
        "data": {**shipped["data"], "train": _write_path(facts.path, output), "max_tokens": _ANY_LENGTH},
        "trainer": {**shipped["trainer"], ACCUMULATION: _choose_accumulation(facts.rows, shipped["trainer"])},
        "output": f"runs/{output.stem}",
    }
    row = find_alias(checkpoint)
    if row is None or row.stage == _KNOWS_CHAT:  # only the pre-trained checkpoints never saw the tokens of a chat
        content["adapter"] = {key: value for key, value in shipped["adapter"].items() if key != "train_tokens"}
    earlier = find_earlier(checkpoint)
    if earlier is not None and earlier.is_adapter:  # which fixes its own form and that of its base model
        for section in ("model", "adapter"):
            content[section] = {
                key: value for key, value in content[section].items() if f"{section}.{key}" not in FORM_KEYS
            }
    if facts.rows < _FEWEST_TO_HOLD_OUT:
        del content["data"]["held_out"]
    if not target.is_gpu:
        content["trainer"]["use_cpu"] = True
    return content


def _write_path(path: Path, recipe: Path) -> str:
    """Return the path of the rows: relative to a recipe in the same folder or above it, else absolute."""
    rows, folder = expand_home(path).resolve(), expand_home(recipe).resolve().parent
    return (rows.relative_to(folder) if rows.is_relative_to(folder) else rows).as_posix()


def _choose_accumulation(rows: int, trainer: Mapping[str, Any]) -> int:
    """Return how many micro-batches make a step: as in the shipped recipe, or fewer where an epoch would have few steps."""
    accumulation = int(trainer[ACCUMULATION])
    while accumulation > 1 and rows < _STEPS_OF_AN_EPOCH * int(trainer[BATCH]) * accumulation:
        accumulation //= 2
    return accumulation


def _measure_rows(content: Mapping[str, Any], output: Path) -> tuple[int | None, tuple[str, ...]]:
    """Return the longest row in tokens, None where no tokenizer can be had, and what is to be said about the rows."""
    try:
        report = prepare_rows(_resolve(content, output))[1].report
    except CheckpointError as error:
        return None, (f"the rows were not measured, because the tokenizer is not at hand: {error}",)
    return max(split.longest for split in (report.train, report.evaluation) if split is not None), report.notes


def _round_length(tokens: int) -> int:
    return next((length for length in _LENGTHS if length >= tokens), _LENGTHS[-1])


def _fit(content: dict[str, Any], target: Target, output: Path) -> Plan:
    """Change the content until its plan fits the device, and return the plan.

    Raises:
        MachineError: nothing fits.
    """
    plan, steps = find_fitting_plan(_resolve(content, output), target)
    if plan.fits is False:
        raise MachineError(
            f"{content['model']['checkpoint']}: even the smallest settings do not fit this device ({describe_verdict(plan)}); "
            "take a device with more memory"
        )
    for step in steps:
        for key, value in step.change.settings.items():
            section, name = key.split(".")
            content[section][name] = value
    return plan


def _resolve(content: Mapping[str, Any], output: Path) -> ResolvedRecipe:
    return resolve_draft(draft_recipe(output, copy.deepcopy(dict(content))), str(output))


def _write_head(facts: DataFacts, checkpoint: str, plan: Plan, output: Path) -> str:
    return (
        f"{describe_count(facts.rows, 'row')} of the format {facts.format} on the base checkpoint {checkpoint}; written by `finetune init`.\n"
        f"The plan {describe_verdict(plan)}.\n"
        f"Train it: finetune train {output}\n"
        f"Every other key: finetune recipes --keys"
    )


def describe_first_recipe(first: FirstRecipe) -> str:
    """Return what was written, and the next commands."""
    longest = "" if first.longest is None else f", the longest of {describe_count(first.longest, 'token')}"
    return "\n".join(
        [
            f"{first.recipe}: {first.method} of {first.checkpoint} on {describe_count(first.rows, 'row')} ({first.format}){longest}",
            f"the plan {describe_verdict(first.plan)}",
            *first.notes,
            "",
            "next:",
            f"  finetune preview {first.recipe}    # see what is trained",
            f"  finetune train {first.recipe}",
        ]
    )
