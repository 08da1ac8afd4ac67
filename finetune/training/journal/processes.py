"""Record how many processes share a run and by which engine, and check that all of them train the same."""

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from finetune.errors import TrainingError, describe_count
from finetune.files.launcher import count_processes, is_launched, read_rank
from finetune.models.engine import ENGINES, find_engine
from finetune.recipe.sections import Recipe, dump_recipe
from finetune.runs.resuming import read_run_record

_ENGINE, _PROCESSES = "engine", "processes"


def describe_processes() -> dict[str, Any]:
    """Return the engine and the number of processes as the record of a run holds them."""
    return {_ENGINE: find_engine(), _PROCESSES: count_processes()}


def check_same_processes(run: Path) -> None:
    """Check that a run is resumed by as many processes, and by the same engine, as it began with.

    Otherwise its effective batch size, its schedule and its place in the data would change, and its checkpoints hold the optimizer
    state in the engine's own form. A record from before this was recorded says nothing.

    Raises:
        TrainingError: it is not, or the record is damaged.
    """
    before, now = read_run_record(run), describe_processes()
    if _ENGINE not in before or {name: before[name] for name in now} == now:
        return
    raise TrainingError(
        f"{run}: this run was begun by {_describe(before)} and cannot be resumed by {_describe(now)}; launch it as it began, or start "
        "again with another output"
    )


def _describe(found: dict[str, Any]) -> str:
    engine, count = ENGINES[found[_ENGINE]], found[_PROCESSES]
    return (
        engine.title
        if found[_ENGINE] == "one"
        else f"{describe_count(count, 'process', 'processes')} with {engine.title}"
    )


def list_state_files() -> list[str]:
    """Return the files of a checkpoint from which this process goes on, as transformers names them.

    An engine that shards keeps its optimizer state in a folder of its own form.
    """
    engine = ENGINES[find_engine()]
    own = f"rng_state_{read_rank()}.pth" if is_launched() else "rng_state.pth"
    return [own] if engine.shards_weights or engine.is_deepspeed else [own, "optimizer.pt", "scheduler.pt"]


def check_same_recipes(recipe: Recipe, *, resume: bool) -> None:
    """Check that all processes of a launch were given the same recipe and options. Every process must call it.

    Raises:
        TrainingError: they were not.
    """
    lines = {f"line {number}": line for number, line in enumerate(dump_recipe(recipe).splitlines())}
    _compare("recipes", {**lines, "resume": f"resume: {resume}"})


def check_same_rows(rows_fingerprint: str, base_fingerprint: str) -> None:
    """Check that all processes of a launch have read the same rows and base checkpoint. Every process must call it.

    Raises:
        TrainingError: they have not.
    """
    _compare("inputs", {"rows": f"rows: {rows_fingerprint}", "base": f"base: {base_fingerprint}"})


def _compare(what: str, own: dict[str, str]) -> None:
    if count_processes() == 1:
        return
    found: list[dict[str, str]] = gather_object([own])
    for rank, other in enumerate(found):
        if other != found[0]:
            names = [name for name in {**found[0], **other} if found[0].get(name) != other.get(name)]
            first, second = found[0].get(names[0], "nothing"), other.get(names[0], "nothing")
            raise TrainingError(
                f"the processes of this launch have different {what}: process 0 has `{first.strip()}`, process {rank} has "
                f"`{second.strip()}`; start all of them with the same recipe, files and options"
            )
