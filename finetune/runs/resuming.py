"""Hold the run directory, and check that a stopped run can be resumed: from a whole checkpoint, with the same inputs."""

import contextlib
import difflib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.api_arguments import name_option
from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.errors import OutputError, TrainingError
from finetune.files.folders import check_output_free, check_writable, list_partials
from finetune.files.json_files import name_partial, read_json, write_text
from finetune.files.launcher import is_main_process
from finetune.files.safety.locks import LOCK_FILE, lock_folder
from finetune.recipe.sections import Recipe, dump_recipe
from finetune.runs.run_files import (
    MADE_FILES,
    MADE_FOLDERS,
    RECIPE_FILE,
    RECORD_FILE,
    find_result_folder,
    list_trainer_checkpoints,
)
from finetune.runs.trainer_checkpoints import check_name, find_complete_checkpoint

logger = logging.getLogger(__name__)


# What a run wrote in the place of the ways, when there was one at most.
_NO_WAY = "none"


@dataclass(frozen=True)
class SpeedChoice:
    """The ways to train faster that were chosen, and why; the record of the run keeps it, so that a resumed run computes the same."""

    ways: tuple[str, ...]
    reason: str

    def describe(self) -> str:
        """Return the choice in words."""
        return f"{' and '.join(self.ways) or 'nothing is changed'} ({self.reason})"


@contextlib.contextmanager
def hold_output(output: Path, what: str, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a run or a chain, so that no other process writes into it; make it where it does not exist.

    `what` is "run" or "chain". Folders that this call made are removed again where the block leaves them empty.

    Raises:
        OutputError: another process holds it, it cannot be made, or a fresh one is not empty.
        TrainingError: there is nothing to resume.
    """
    if resume and not (output / RECIPE_FILE).is_file():
        raise TrainingError(
            f"{output}: there is no {what} to resume (no {RECIPE_FILE}); start it without {name_option('--resume')}, or set output to "
            f"the folder where the {what} lies now"
        )
    if not resume:
        check_writable(output)
    with hold_folder(output):
        if not resume:
            _check_fresh(output, what)
        yield


@contextlib.contextmanager
def hold_folder(output: Path) -> Iterator[None]:
    """Hold a folder within the block; make it where it does not exist, and remove it again where the block leaves it empty.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    made = _make_folders(output)
    try:
        with lock_folder(output):
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_fresh(output: Path, what: str) -> None:
    _remove_unfinished(output)
    try:
        check_output_free(output, LOCK_FILE)
    except OutputError as error:
        raise OutputError(f"{error}; or resume the {what} in it with {name_option('--resume')}") from None


def _make_folders(output: Path) -> list[Path]:
    """Make a folder with its parents, and return those that were made, the innermost first.

    Raises:
        OutputError: one cannot be made.
    """
    absent = [output]
    try:
        while not absent[-1].parent.exists():
            absent.append(absent[-1].parent)
        made = [folder for folder in absent if not folder.exists()]
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputError(f"{output}: the output path exists and is not a folder; choose another") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{output}: cannot be made: {reason}; choose another output") from error
    return made


def remove_made_files(run: Path) -> None:
    """Remove what a run has made in its directory, and the directory where nothing else is left; a user's files stay."""
    if not run.is_dir():  # somebody removed or renamed it
        return
    for name in MADE_FILES:
        (run / name).unlink(missing_ok=True)
    for folder in (*(run / name for name in MADE_FOLDERS), *list_trainer_checkpoints(run)):
        shutil.rmtree(folder, ignore_errors=True)
    _remove_unfinished(run)
    if not any(path.name != LOCK_FILE for path in run.iterdir()) and not (run / LOCK_FILE).exists():
        run.rmdir()


def _remove_unfinished(run: Path) -> None:
    """Remove what a killed process was writing: it lies under hidden names that no reader takes for a result."""
    for name in MADE_FILES:
        name_partial(run / name).unlink(missing_ok=True)
    for name in MADE_FOLDERS:
        for folder in list_partials(run / name):
            shutil.rmtree(folder, ignore_errors=True)


def read_run_record(run: Path) -> dict[str, Any]:
    """Return the record of a run, or an empty one where there is no such file.

    Raises:
        FinetuneError: the record is damaged.
    """
    file = run / RECORD_FILE
    record = read_json(file) if file.is_file() else {}
    if not isinstance(record, dict):
        raise TrainingError(f"{file}: must hold an object; the folder is damaged; restore this file")
    return record


def read_speed(run: Path) -> SpeedChoice | None:
    """Return what `model.speed: auto` chose when a run began, as its record says, or None where the run tried nothing.

    Raises:
        FinetuneError: the record is damaged.
    """
    found = read_run_record(run).get("speed")
    if found is None:
        return None
    names = None
    if isinstance(found, dict):
        names = [name for name in [found["way"]] if name != _NO_WAY] if "way" in found else found.get("ways")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TrainingError(
            f"{run / RECORD_FILE}: speed: must be an object with the ways that the run trains with, a list of names; found {found!r}; "
            "the folder is damaged; restore this file"
        )
    return SpeedChoice(tuple(names), str(found.get("reason")))


def has_saved_result(run: Path) -> bool:
    """Tell whether a run was stopped after its result was written and before its record said so."""
    return find_result_folder(run) is not None and read_run_record(run).get("status") == "saving"


def find_resume_point(recipe: Recipe, run: Path) -> Path:
    """Find the checkpoint to resume from, and check that the recipe is the one that the run began with.

    Raises:
        TrainingError: there is nothing to resume, or the recipe has changed since.
    """
    result = find_result_folder(run)
    if result is not None and read_run_record(run).get("status") == "finished":
        raise TrainingError(f"{run}: this run has finished; export it, or set another output to train again")
    check_same_recipe(run / RECIPE_FILE, dump_recipe(recipe), "run")
    if recipe.trainer.get("save_only_model"):
        raise TrainingError(
            f"{run}: its checkpoints hold no optimizer state (trainer.save_only_model: true), so training would begin anew from their "
            "weights; use a checkpoint as it is, or start again without this key"
        )
    checkpoint = find_complete_checkpoint(run)
    if checkpoint is None and list_trainer_checkpoints(run):
        raise TrainingError(
            f"{run}: none of its checkpoints is whole, so it cannot be resumed; remove the folder and start again without {name_option('--resume')}"
        )
    if checkpoint is None:
        raise TrainingError(
            f"{run}: this run was stopped before its first checkpoint; remove the folder and start again without {name_option('--resume')}"
        )
    check_name(checkpoint)
    logger.info("resuming %s from %s", run, checkpoint.name)
    return checkpoint


def check_same_recipe(saved: Path, current: str, what: str) -> None:
    """Check that a recipe is the one that a run or a chain began with; `what` names it in the message.

    A folder that was moved has another `output`, and the stages of a moved chain have other paths to each other; the main process
    writes such a recipe anew. What lies at these paths is compared by content elsewhere.

    Raises:
        TrainingError: it is another; the message lists the lines that differ.
    """
    try:
        before = saved.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{saved}: cannot be read ({error}); restore it, or start again with another output"
        ) from error
    moved = _move_paths(before, current)
    changes = _list_changes(moved, current)
    if any(not change[2:].startswith("output: ") for change in changes) and not _says_the_same(moved, current):
        raise TrainingError(
            f"{saved.parent}: the recipe has changed since this {what} started, so it cannot be resumed:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nrestore these lines, or resume with the {what}'s own recipe: finetune train {saved} --resume"
        )
    if _read_output(before) != _read_output(current) and is_main_process():
        logger.info("%s: this %s was moved here from another folder", saved.parent, what)
        write_text(saved, current)


def _says_the_same(saved: str, current: str) -> bool:
    """Tell whether two recipes differ in nothing but outputs and the order of keys, which says nothing."""
    try:
        return bool(_leave_out_outputs(yaml.safe_load(saved)) == _leave_out_outputs(yaml.safe_load(current)))
    except yaml.YAMLError:
        return False


def _leave_out_outputs(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _leave_out_outputs(value) for key, value in content.items() if key != "output"}
    return [_leave_out_outputs(value) for value in content] if isinstance(content, list) else content


def _move_paths(saved: str, current: str) -> str:
    """Return a saved recipe with paths as they are after a move of a folder around its output; lines that both recipes have stay."""
    before, now = _find_move(Path(_read_output(saved)), Path(_read_output(current)))
    known = set(current.splitlines())
    return "\n".join(
        line if line in known else re.sub(rf"(?<=[ '\"]){re.escape(before)}", lambda _: now, line)
        for line in saved.splitlines()
    )


def _find_move(before: Path, now: Path) -> tuple[str, str]:
    """Return how the paths below the outermost folder that was moved or renamed began and begin, given two paths of one output."""
    before, now = before.parent, now.parent
    while before.name and before.name == now.name and before != now:
        before, now = before.parent, now.parent
    return str(before / "_")[:-1], str(now / "_")[:-1]


def _read_output(recipe: str) -> str:
    found = re.search(r"^output: (.*)$", recipe, re.MULTILINE)
    return found[1].strip("'\"") if found else ""


def _list_changes(saved: str, current: str) -> list[str]:
    lines = difflib.ndiff(saved.splitlines(), current.splitlines())
    return [f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "-+"]


def check_same_inputs(run: Path, rows_fingerprint: str, base: Path, judge: str | None) -> None:
    """Check by content that rows, base checkpoint and judge are those that the run began with.

    Raises:
        TrainingError: one of them has changed.
    """
    record = read_json(run / RECORD_FILE)
    try:
        before = (record["data"]["fingerprint"], record["base_fingerprint"], record["judge_fingerprint"])
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / RECORD_FILE}: does not say what the run began with, so it cannot be resumed; start again with another output"
        ) from error
    names = ("the rows", "the base checkpoint", "the judge")
    found = (rows_fingerprint, fingerprint_checkpoint(base), judge)
    now = {name: (first, second) for name, first, second in zip(names, before, found, strict=True)}
    changed = " and ".join(name for name, (before, after) in now.items() if before != after)
    if changed:
        raise TrainingError(
            f"{run}: {changed} changed since this run started, so it cannot be resumed; "
            "restore what changed, or start again with another output"
        )
