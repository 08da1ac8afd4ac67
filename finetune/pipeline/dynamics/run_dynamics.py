"""Measure many checkpoints the same way, one after the other, and put them side by side."""

import logging
from collections.abc import Sequence
from pathlib import Path

from finetune.checkpoints.checkpoint_table import find_published
from finetune.evaluation.tasks.run_tasks import (
    ask_tasks,
    describe_evaluation,
)
from finetune.evaluation.tasks.task_results import make_folder
from finetune.files.json_files import write_json
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.growth.activity import measure_activity
from finetune.growth.growth_plots import draw_growth
from finetune.growth.growth_report import Growth, write_report
from finetune.growth.published_scores import compare_published
from finetune.growth.weights.weight_statistics import measure_weights
from finetune.models.opening import open_model
from finetune.pipeline.dynamics.dynamics_inputs import (
    ACTIVITY,
    ACTIVITY_FILE,
    TASKS,
    TUNED,
    WEIGHTS,
    DynamicsSettings,
    Inputs,
    list_missing,
    read_inputs,
)
from finetune.pipeline.dynamics.gathering import gather
from finetune.pipeline.dynamics.tuning import (
    plan_tuning,
    remove_tuned_weights,
    train_tuning,
)
from finetune.pipeline.dynamics.visits import KEPT, Visit, bring, check_visit, plan_visits, remove_brought
from finetune.pipeline.experiment_folder import hold_experiment
from finetune.pipeline.finishing import free_memory
from finetune.runs.results import find_earlier

logger = logging.getLogger(__name__)


def run_dynamics(names: Sequence[str], settings: DynamicsSettings, output: Path) -> Growth:
    """Measure checkpoints and write the comparison; what the folder holds of an earlier call is not measured again.

    All that the user can mend is looked for before the first checkpoint is opened.

    Raises:
        FinetuneError: a checkpoint, the rows or the folder cannot be used.
    """
    inputs = read_inputs(settings)
    visits = plan_visits(names, output)
    _describe_published(names)
    # Looking at samples mends a half-written line, so that no other process may be writing.
    with hold_experiment(output, "checkpoints", "comparison of checkpoints"):
        for visit in visits:
            if list_missing(visit, inputs):
                check_visit(visit, needs_tokenizer=bool(settings.tasks or settings.texts or settings.tuning))
        for number, visit in enumerate(visits, 1):
            logger.info("checkpoint %d of %d: %s", number, len(visits), visit.label)
            _measure(visit, inputs)
        growth = gather(visits, inputs, output)
        with translate_os_errors(output, KEPT):
            write_report(growth, output, draw_growth(growth, output))
    return growth


def _describe_published(names: Sequence[str]) -> None:
    """Say what the authors' own figures show, before any is measured."""
    known = [
        name for name in names if (row := find_published(name)) is not None and row.scores and not find_earlier(name)
    ]
    if len(known) > 1:
        for sentence in compare_published(known).sentences:
            logger.info("%s", sentence)


def _measure(visit: Visit, inputs: Inputs) -> None:
    keeps = inputs.settings.keep == "all"
    if missing := list_missing(visit, inputs):
        with bring(visit, keeps=keeps):
            fingerprint = visit.identify()
            if WEIGHTS in missing:
                measure_weights(visit.name, visit.folder / WEIGHTS)
            if missing & {TASKS, ACTIVITY}:
                _run_model(visit, inputs, missing, fingerprint)
            if TUNED in missing:
                _tune(visit, inputs)
    else:
        logger.info("%s: measured already", visit.label)
    if not keeps:  # also what a call left that was stopped just before
        if inputs.settings.tuning is not None:
            remove_tuned_weights(plan_tuning(visit, inputs.settings.tuning))
        remove_brought(visit)


def _run_model(visit: Visit, inputs: Inputs, missing: set[str], fingerprint: str) -> None:
    # Texts are read in one pass each, where tasks take one for every token of an answer.
    loaded = open_model(visit.name, streams=TASKS not in missing)
    if TASKS in missing:
        folder = visit.folder / TASKS
        make_folder(folder, describe_evaluation(fingerprint, inputs.prepared, inputs.tasks))
        ask_tasks(inputs.tasks.ask_with(loaded), visit.label, inputs.prepared, inputs.tasks, folder, inputs.runner)
    if ACTIVITY in missing:
        written = {"texts": inputs.hash_texts(), "activity": measure_activity(loaded, inputs.texts)}
        with translate_os_errors(visit.folder, KEPT):
            write_json(visit.folder / ACTIVITY_FILE, written)
    del loaded
    free_memory()


def _tune(visit: Visit, inputs: Inputs) -> None:
    assert inputs.settings.tuning is not None
    tuning = plan_tuning(visit, inputs.settings.tuning)
    fingerprint = train_tuning(tuning)
    free_memory()
    if inputs.prepared:
        folder = tuning.tasks_folder
        loaded = open_model(str(tuning.resolved.output))
        make_folder(folder, describe_evaluation(fingerprint, inputs.prepared, inputs.tuned_tasks))
        tasks = inputs.tuned_tasks
        ask_tasks(tasks.ask_with(loaded), visit.label, inputs.prepared, tasks, folder, inputs.runner)
        del loaded
        free_memory()
