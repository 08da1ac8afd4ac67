"""The same fine-tuning from each of many checkpoints, and the scores of what it gives."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.check.recipes import load_recipe
from finetune.data.reading.sources import hash_source
from finetune.errors import OutputError, RecipeError
from finetune.evaluation.tasks.task_settings import TaskSettings
from finetune.files.json_files import read_json, write_json
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.models.opening import fingerprint_model
from finetune.pipeline.dynamics.visits import KEPT, Visit, find_earlier_folder
from finetune.pipeline.finishing import REPORTED, finish_compared
from finetune.recipe.sections import to_plain
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.run_files import MADE_FOLDERS, list_trainer_checkpoints
from finetune.training.training_rows import read_data_settings

_RECORD_FILE = "tuned.json"
_FOLDER, _RUN_FOLDER = "tuned", "run"
_OWNED = ("model.checkpoint=", "output=", "model=")


@dataclass(frozen=True)
class TuningSettings:
    """The recipe that is trained from each checkpoint, with its overrides; `chat` asks the tuned models in their template."""

    recipe: Path
    overrides: Sequence[str] = ()
    chat: bool = False


@dataclass(frozen=True)
class Tuning:
    """The fine-tuning of one checkpoint: its recipe, and the folder of its run and its results."""

    resolved: ResolvedRecipe
    folder: Path

    @property
    def tasks_folder(self) -> Path:
        """The folder of the evaluation."""
        return self.folder / "tasks"

    def read_record(self) -> dict[str, Any] | None:
        """Return what the run reported, with the hash of its weights, or None where it has not finished.

        Raises:
            OutputError: it was another recipe, or other rows.
        """
        record = read_json(self.folder / _RECORD_FILE)
        if not isinstance(record, dict):
            return None
        if record.get("inputs") != _hash_inputs(self.resolved):
            raise OutputError(
                f"{self.folder}: holds the result of another recipe, or of other rows; choose another folder with -o, or remove it"
            )
        return record


def plan_tuning(visit: Visit, settings: TuningSettings) -> Tuning:
    """Return the checked recipe for a checkpoint.

    Raises:
        RecipeError: it has problems, or an override sets what differs from checkpoint to checkpoint.
    """
    owned = [text for text in settings.overrides if text.startswith(_OWNED)]
    if owned:
        problem = f"--set {owned[0]}: dynamics sets model.checkpoint and output for each checkpoint; leave it out"
        raise RecipeError(str(settings.recipe), [problem])
    folder = visit.folder / _FOLDER
    name = find_earlier_folder(visit.name) or visit.name
    own = [f"model.checkpoint={name}", f"output={(folder / _RUN_FOLDER).absolute()}"]
    return Tuning(load_recipe(settings.recipe, [*settings.overrides, *own]), folder)


def choose_tuned_tasks(tasks: TaskSettings, settings: TuningSettings) -> TaskSettings:
    """Return how a tuned model is asked."""
    return replace(tasks, chat=settings.chat)


def train_tuning(tuning: Tuning) -> str:
    """Train what is left of the recipe, in the same way as from the other checkpoints; return the hash of the trained weights.

    Raises:
        FinetuneError: see `finish_compared`.
    """
    runs = tuning.folder.parent.parent.glob(f"*/{_FOLDER}/{_RUN_FOLDER}")
    finished = finish_compared(tuning.resolved, runs)
    record = {name: finished.summary.get(name) for name in REPORTED}
    fingerprint = fingerprint_model(str(tuning.resolved.output))
    with translate_os_errors(tuning.folder, KEPT):
        write_json(
            tuning.folder / _RECORD_FILE,
            {**record, "fingerprint": fingerprint, "inputs": _hash_inputs(tuning.resolved)},
        )
    return fingerprint


def remove_tuned_weights(tuning: Tuning) -> None:
    """Remove the weights of a run, and keep its record, its curves and its page."""
    run = tuning.resolved.output
    for folder in (*(run / name for name in MADE_FOLDERS), *list_trainer_checkpoints(run)):
        shutil.rmtree(folder, ignore_errors=True)


def describe_tuning(tuning: Tuning) -> dict[str, Any]:
    """Return what is reported of a finished run."""
    record = tuning.read_record() or {}
    return {name: record.get(name) for name in REPORTED}


def _hash_inputs(resolved: ResolvedRecipe) -> str:
    sources = [hash_source(source) for source in read_data_settings(resolved).train]
    return hashlib.sha256(json.dumps([to_plain(resolved.recipe), sources], default=str).encode()).hexdigest()
