"""What is measured of every checkpoint, and which of it is there already."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import OutputError
from finetune.evaluation.sandbox.programs import Program, Verdict, choose_runner
from finetune.evaluation.tasks.run_tasks import PreparedTask, prepare_tasks, recall_evaluation
from finetune.evaluation.tasks.task_data import hash_rows
from finetune.evaluation.tasks.task_results import Evaluation
from finetune.evaluation.tasks.task_settings import TaskSettings
from finetune.files.json_files import read_json
from finetune.growth.activity import SourcedText, read_texts
from finetune.growth.weights.weight_statistics import STATISTICS_FILE
from finetune.pipeline.dynamics.tuning import Tuning, TuningSettings, choose_tuned_tasks, plan_tuning
from finetune.pipeline.dynamics.visits import Visit

Keep = Literal["all", "none"]
TASKS, WEIGHTS, ACTIVITY, TUNED = "tasks", "weights", "activity", "tuned"
ACTIVITY_FILE = "activity.json"


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
class Inputs:
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


def read_inputs(settings: DynamicsSettings) -> Inputs:
    texts = read_texts(settings.texts)
    if settings.tasks is None:
        return Inputs(settings, texts=texts)
    prepared = prepare_tasks(settings.tasks)
    runner = choose_runner(settings.tasks.unsafe_code) if any(one.form.runs_code for one in prepared) else None
    return Inputs(settings, prepared, runner, texts)


def list_missing(visit: Visit, inputs: Inputs) -> set[str]:
    """Return the parts of a checkpoint's results that are not there yet, without opening its weights."""
    missing = set()
    if not (visit.folder / WEIGHTS / STATISTICS_FILE).is_file():
        missing.add(WEIGHTS)
    if inputs.prepared and recall_tasks(visit, inputs) is None:
        missing.add(TASKS)
    if inputs.texts and recall_activity(visit, inputs) is None:
        missing.add(ACTIVITY)
    if inputs.settings.tuning is not None:
        tuning = plan_tuning(visit, inputs.settings.tuning)
        if tuning.read_record() is None or (inputs.prepared and recall_tuned(visit, tuning, inputs) is None):
            missing.add(TUNED)
    return missing


def recall_tasks(visit: Visit, inputs: Inputs) -> Evaluation | None:
    fingerprint = visit.read_record().get("fingerprint")
    return recall_evaluation(visit.label, fingerprint, inputs.prepared, inputs.tasks, visit.folder / TASKS)


def recall_tuned(visit: Visit, tuning: Tuning, inputs: Inputs) -> Evaluation | None:
    fingerprint = (tuning.read_record() or {}).get("fingerprint")
    return recall_evaluation(visit.label, fingerprint, inputs.prepared, inputs.tuned_tasks, tuning.tasks_folder)


def recall_activity(visit: Visit, inputs: Inputs) -> dict[str, Any] | None:
    """Return what a model did with the texts, or None where it has not read them.

    Raises:
        OutputError: it has read others.
    """
    written = read_json(visit.folder / ACTIVITY_FILE)
    if not isinstance(written, dict):
        return None
    if written.get("texts") != inputs.hash_texts():
        raise OutputError(
            f"{visit.folder}: holds the activity on other rows than those of --rows; choose another folder with -o, or remove it"
        )
    return dict(written["activity"])
