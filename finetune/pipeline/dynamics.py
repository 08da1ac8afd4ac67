"""Measure many checkpoints the same way, one after the other, and put them side by side."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from finetune.checkpoints.checkpoint_table import find_published
from finetune.errors import OutputError
from finetune.evaluation.sandbox.programs import Program, Verdict, choose_runner
from finetune.evaluation.tasks.run_tasks import (
    PreparedTask,
    TaskSettings,
    ask_tasks,
    describe_evaluation,
    prepare_tasks,
    recall_evaluation,
)
from finetune.evaluation.tasks.task_results import Evaluation, make_folder
from finetune.files.folders import check_writable
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.growth.growth_plots import draw_growth
from finetune.growth.growth_report import CheckpointEntry, Growth, write_report
from finetune.growth.scores.score_lines import (
    ScoreLine,
    list_published_measures,
    make_measured_lines,
    make_published_lines,
)
from finetune.growth.tokens_seen import find_tokens_seen
from finetune.growth.weights.weight_changes import read_weights
from finetune.growth.weights.weight_statistics import STATISTICS_FILE, measure_weights
from finetune.models.opening import open_model
from finetune.pipeline.visits import KEPT, Visit, bring, check_visit, plan_visits, remove_brought
from finetune.runs.resuming import hold_folder

logger = logging.getLogger(__name__)

Keep = Literal["all", "none"]
_TASKS, _WEIGHTS = "tasks", "weights"


@dataclass(frozen=True)
class DynamicsSettings:
    """What is measured of each checkpoint; `keep="none"` removes what was downloaded and folded for it."""

    tasks: TaskSettings | None = None
    keep: Keep = "all"


@dataclass(frozen=True)
class _Inputs:
    """All that is read once and holds for every checkpoint."""

    settings: DynamicsSettings
    prepared: Sequence[PreparedTask] = ()
    runner: Callable[[Program], Verdict] | None = None

    @property
    def tasks(self) -> TaskSettings:
        """The settings of the tasks; there are some."""
        assert self.settings.tasks is not None
        return self.settings.tasks


def run_dynamics(names: Sequence[str], settings: DynamicsSettings, output: Path) -> Growth:
    """Measure checkpoints and write the comparison; what the folder holds of an earlier call is not measured again.

    All that the user can mend is looked for before the first checkpoint is opened.

    Raises:
        FinetuneError: a checkpoint, the rows or the folder cannot be used.
    """
    inputs = _read_inputs(settings)
    _check_output(output)
    visits = plan_visits(names, output)
    for visit in visits:
        if _list_missing(visit, inputs):
            check_visit(visit, needs_tokenizer=settings.tasks is not None)
    with _leave_nothing_empty(output), hold_folder(output):
        for number, visit in enumerate(visits, 1):
            logger.info("checkpoint %d of %d: %s", number, len(visits), visit.label)
            _measure(visit, inputs)
        growth = _gather(visits, inputs, output)
        with translate_os_errors(output, KEPT):
            write_report(growth, output, draw_growth(growth, output))
    return growth


def _read_inputs(settings: DynamicsSettings) -> _Inputs:
    if settings.tasks is None:
        return _Inputs(settings)
    prepared = prepare_tasks(settings.tasks)
    runner = choose_runner(settings.tasks.unsafe_code) if any(one.form.runs_code for one in prepared) else None
    return _Inputs(settings, prepared, runner)


def _check_output(output: Path) -> None:
    """Check that a folder is free, or that it holds an earlier call's results.

    Raises:
        OutputError: it holds something else, or cannot be made.
    """
    if (output / "checkpoints").is_dir():
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and holds no comparison of checkpoints; choose another folder with -o")
    check_writable(output)


@contextmanager
def _leave_nothing_empty(output: Path) -> Iterator[None]:
    """Remove folders that a stopped call has made and left empty."""
    try:
        yield
    except BaseException:
        for folder in sorted((path for path in output.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        raise


def _list_missing(visit: Visit, inputs: _Inputs) -> set[str]:
    """Return the parts of a checkpoint's results that are not there yet, without opening its weights."""
    missing = set()
    if not (visit.folder / _WEIGHTS / STATISTICS_FILE).is_file():
        missing.add(_WEIGHTS)
    if inputs.prepared and _recall(visit, inputs) is None:
        missing.add(_TASKS)
    return missing


def _recall(visit: Visit, inputs: _Inputs) -> Evaluation | None:
    fingerprint = visit.read_record().get("fingerprint")
    return recall_evaluation(visit.label, fingerprint, inputs.prepared, inputs.tasks, visit.folder / _TASKS)


def _measure(visit: Visit, inputs: _Inputs) -> None:
    keeps = inputs.settings.keep == "all"
    if missing := _list_missing(visit, inputs):
        with bring(visit, keeps=keeps):
            fingerprint = visit.identify()
            if _WEIGHTS in missing:
                measure_weights(visit.name, visit.folder / _WEIGHTS)
            if _TASKS in missing:
                _ask(visit, inputs, fingerprint)
    else:
        logger.info("%s: measured already", visit.label)
    if not keeps:
        remove_brought(visit)


def _ask(visit: Visit, inputs: _Inputs, fingerprint: str) -> None:
    loaded = open_model(visit.name)
    folder = visit.folder / _TASKS
    make_folder(folder, describe_evaluation(fingerprint, inputs.prepared, inputs.tasks))
    ask_tasks(loaded, visit.label, inputs.prepared, inputs.tasks, folder, inputs.runner)
    del loaded
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gather(visits: Sequence[Visit], inputs: _Inputs, output: Path) -> Growth:
    """Read the results of all checkpoints and compare them."""
    entries = []
    for number, visit in enumerate(visits):
        before = visits[number - 1].folder / _WEIGHTS if number else None
        entries.append(
            CheckpointEntry(
                visit.label,
                find_tokens_seen(visit.name),
                visit.read_record().get("commit"),
                read_weights(visit.folder / _WEIGHTS, before),
            )
        )
    return Growth(
        str(output), inputs.tasks.protocol if inputs.prepared else "", tuple(entries), _compare(visits, inputs)
    )


def _compare(visits: Sequence[Visit], inputs: _Inputs) -> tuple[ScoreLine, ...]:
    if not inputs.prepared:
        return ()
    evaluations = [evaluation for visit in visits if (evaluation := _recall(visit, inputs)) is not None]
    published = make_published_lines(
        [find_published(visit.name) for visit in visits], list_published_measures(inputs.prepared)
    )
    return (*published, *make_measured_lines(inputs.prepared, evaluations, "measured"))
