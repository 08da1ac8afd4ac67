"""Measure many checkpoints the same way, one after the other, and put them side by side."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
from finetune.evaluation.tasks.task_data import hash_rows
from finetune.evaluation.tasks.task_results import Evaluation, make_folder
from finetune.files.folders import check_writable
from finetune.files.json_files import read_json, write_json
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.growth.activity import SourcedText, measure_activity, read_texts
from finetune.growth.growth_plots import draw_growth
from finetune.growth.growth_report import CheckpointEntry, Growth, write_report
from finetune.growth.published_scores import compare_published
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
from finetune.pipeline.tuning import (
    Tuning,
    TuningSettings,
    choose_tuned_tasks,
    describe_tuning,
    plan_tuning,
    remove_tuned_weights,
    train_tuning,
)
from finetune.pipeline.visits import KEPT, Visit, bring, check_visit, plan_visits, remove_brought
from finetune.runs.results import find_earlier
from finetune.runs.resuming import hold_folder

logger = logging.getLogger(__name__)

Keep = Literal["all", "none"]
_TASKS, _WEIGHTS, _ACTIVITY, _TUNED = "tasks", "weights", "activity", "tuned"
_ACTIVITY_FILE = "activity.json"


@dataclass(frozen=True)
class DynamicsSettings:
    """What is measured of each checkpoint; `keep="none"` removes what was downloaded, folded and trained for it.

    `texts` are files of rows on which activations, attention and loss are looked at, `tuning` is a recipe to train from each.
    """

    tasks: TaskSettings | None = None
    keep: Keep = "all"
    texts: tuple[Path, ...] = ()
    tuning: TuningSettings | None = None


@dataclass(frozen=True)
class _Inputs:
    """All that is read once and holds for every checkpoint."""

    settings: DynamicsSettings
    prepared: Sequence[PreparedTask] = ()
    runner: Callable[[Program], Verdict] | None = None
    texts: Sequence[SourcedText] = ()

    @property
    def tasks(self) -> TaskSettings:
        """The settings of the tasks; there are some."""
        assert self.settings.tasks is not None
        return self.settings.tasks

    @property
    def tuned_tasks(self) -> TaskSettings:
        """The settings of the tasks for tuned models; there are some."""
        assert self.settings.tuning is not None
        return choose_tuned_tasks(self.tasks, self.settings.tuning)

    def hash_texts(self) -> str:
        """Return a hash of the texts."""
        return hash_rows([asdict(text) for text in self.texts])


def run_dynamics(names: Sequence[str], settings: DynamicsSettings, output: Path) -> Growth:
    """Measure checkpoints and write the comparison; what the folder holds of an earlier call is not measured again.

    All that the user can mend is looked for before the first checkpoint is opened.

    Raises:
        FinetuneError: a checkpoint, the rows or the folder cannot be used.
    """
    inputs = _read_inputs(settings)
    _check_output(output)
    visits = plan_visits(names, output)
    _describe_published(names)
    for visit in visits:
        if _list_missing(visit, inputs):
            check_visit(visit, needs_tokenizer=bool(settings.tasks or settings.texts or settings.tuning))
    with _leave_nothing_empty(output), hold_folder(output):
        for number, visit in enumerate(visits, 1):
            logger.info("checkpoint %d of %d: %s", number, len(visits), visit.label)
            _measure(visit, inputs)
        growth = _gather(visits, inputs, output)
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


def _read_inputs(settings: DynamicsSettings) -> _Inputs:
    texts = read_texts(settings.texts)
    if settings.tasks is None:
        return _Inputs(settings, texts=texts)
    prepared = prepare_tasks(settings.tasks)
    runner = choose_runner(settings.tasks.unsafe_code) if any(one.form.runs_code for one in prepared) else None
    return _Inputs(settings, prepared, runner, texts)


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
    if inputs.texts and _recall_activity(visit, inputs) is None:
        missing.add(_ACTIVITY)
    if inputs.settings.tuning is not None:
        tuning = plan_tuning(visit, inputs.settings.tuning)
        if tuning.read_record() is None or (inputs.prepared and _recall_tuned(visit, tuning, inputs) is None):
            missing.add(_TUNED)
    return missing


def _recall(visit: Visit, inputs: _Inputs) -> Evaluation | None:
    fingerprint = visit.read_record().get("fingerprint")
    return recall_evaluation(visit.label, fingerprint, inputs.prepared, inputs.tasks, visit.folder / _TASKS)


def _recall_tuned(visit: Visit, tuning: Tuning, inputs: _Inputs) -> Evaluation | None:
    fingerprint = (tuning.read_record() or {}).get("fingerprint")
    return recall_evaluation(visit.label, fingerprint, inputs.prepared, inputs.tuned_tasks, tuning.tasks_folder)


def _recall_activity(visit: Visit, inputs: _Inputs) -> dict[str, Any] | None:
    """Return what a model did with the texts, or None where it has not read them.

    Raises:
        OutputError: it has read others.
    """
    written = read_json(visit.folder / _ACTIVITY_FILE)
    if not isinstance(written, dict):
        return None
    if written.get("texts") != inputs.hash_texts():
        raise OutputError(
            f"{visit.folder}: holds the activity on other rows than those of --rows; choose another folder with -o, or remove it"
        )
    return dict(written["activity"])


def _measure(visit: Visit, inputs: _Inputs) -> None:
    keeps = inputs.settings.keep == "all"
    if missing := _list_missing(visit, inputs):
        with bring(visit, keeps=keeps):
            fingerprint = visit.identify()
            if _WEIGHTS in missing:
                measure_weights(visit.name, visit.folder / _WEIGHTS)
            if missing & {_TASKS, _ACTIVITY}:
                _run_model(visit, inputs, missing, fingerprint)
            if _TUNED in missing:
                _tune(visit, inputs, keeps=keeps)
    else:
        logger.info("%s: measured already", visit.label)
    if not keeps:
        remove_brought(visit)


def _run_model(visit: Visit, inputs: _Inputs, missing: set[str], fingerprint: str) -> None:
    loaded = open_model(visit.name)
    if _TASKS in missing:
        folder = visit.folder / _TASKS
        make_folder(folder, describe_evaluation(fingerprint, inputs.prepared, inputs.tasks))
        ask_tasks(loaded, visit.label, inputs.prepared, inputs.tasks, folder, inputs.runner)
    if _ACTIVITY in missing:
        written = {"texts": inputs.hash_texts(), "activity": measure_activity(loaded, inputs.texts)}
        with translate_os_errors(visit.folder, KEPT):
            write_json(visit.folder / _ACTIVITY_FILE, written)
    del loaded
    _free_memory()


def _tune(visit: Visit, inputs: _Inputs, *, keeps: bool) -> None:
    assert inputs.settings.tuning is not None
    tuning = plan_tuning(visit, inputs.settings.tuning)
    fingerprint = train_tuning(tuning)
    _free_memory()
    if inputs.prepared:
        folder = tuning.tasks_folder
        loaded = open_model(str(tuning.resolved.output))
        make_folder(folder, describe_evaluation(fingerprint, inputs.prepared, inputs.tuned_tasks))
        ask_tasks(loaded, visit.label, inputs.prepared, inputs.tuned_tasks, folder, inputs.runner)
        del loaded
        _free_memory()
    if not keeps:
        remove_tuned_weights(tuning)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gather(visits: Sequence[Visit], inputs: _Inputs, output: Path) -> Growth:
    """Read the results of all checkpoints and compare them."""
    entries = []
    for number, visit in enumerate(visits):
        before = visits[number - 1].folder / _WEIGHTS if number else None
        tuning = inputs.settings.tuning
        entries.append(
            CheckpointEntry(
                visit.label,
                find_tokens_seen(visit.name),
                visit.read_record().get("commit"),
                read_weights(visit.folder / _WEIGHTS, before),
                _recall_activity(visit, inputs) if inputs.texts else None,
                None if tuning is None else describe_tuning(plan_tuning(visit, tuning)),
            )
        )
    protocol = inputs.tasks.protocol if inputs.prepared else ""
    notes = tuple(dict.fromkeys(note for one in inputs.prepared for note in one.notes))
    return Growth(str(output), protocol, tuple(entries), tuple(_compare(visits, inputs)), notes)


def _compare(visits: Sequence[Visit], inputs: _Inputs) -> Iterator[ScoreLine]:
    if not inputs.prepared:
        return
    published = [None if find_earlier(visit.name) else find_published(visit.name) for visit in visits]
    yield from make_published_lines(published, list_published_measures(inputs.prepared))
    measured = [evaluation for visit in visits if (evaluation := _recall(visit, inputs)) is not None]
    yield from make_measured_lines(inputs.prepared, measured, "measured")
    if inputs.settings.tuning is not None:
        tunings = [plan_tuning(visit, inputs.settings.tuning) for visit in visits]
        found = (_recall_tuned(visit, tuning, inputs) for visit, tuning in zip(visits, tunings, strict=True))
        yield from make_measured_lines(inputs.prepared, [one for one in found if one is not None], "tuned")
