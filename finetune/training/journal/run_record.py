"""Write the record of a run: `recipe.yaml` and `run.json`; a run that stops before its first step leaves nothing."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from finetune.api_arguments import name_option
from finetune.checkpoints.hub_names import record_hub
from finetune.errors import TrainingError
from finetune.files.json_files import write_json, write_text
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.models.lora import save_adapter
from finetune.recipe.sections import dump_recipe, to_plain
from finetune.rewards.judge import fingerprint_judge
from finetune.runs.resuming import SpeedChoice, read_run_record, remove_made_files
from finetune.runs.run_files import (
    PISSA_START_FOLDER,
    RECIPE_FILE,
    RECORD_FILE,
    find_result_folder,
    list_trainer_checkpoints,
    read_metrics,
)
from finetune.runs.summary import RunSummary
from finetune.training.journal.environment import describe_environment
from finetune.training.journal.loss_plot import draw_losses
from finetune.training.journal.processes import describe_processes
from finetune.training.setup import Setup
from finetune.watching.board_page import write_report

# The states of a run, in their order: it trains; it has trained its last step and writes its result; all is written.
_STATES = ("running", "saving", "finished")


class RunRecord:
    """Writes what a run is before its first step, and its results after the last one."""

    def __init__(
        self,
        setup: Setup,
        model: PreTrainedModel | PeftModel,
        *,
        resumed: bool,
        speed: SpeedChoice | None = None,
        planned_bytes: int | None = None,
    ) -> None:
        """`speed` is what a resumed run chose when it began; it may be stopped again before it trains."""
        self._setup = setup
        self._model = model
        self._resumed = resumed
        self._planned_bytes = planned_bytes
        self._speed = speed

    def note_speed(self, choice: SpeedChoice) -> None:
        """Write what was decided about the speed, so that a resumed run does the same."""
        self._speed = choice
        self._write_json("running", None)

    def write_start(self) -> None:
        """Write the resolved recipe, the initial adapter of PiSSA, and a record with the status "running"."""
        run, recipe = self._setup.resolved.output, self._setup.resolved.recipe
        with translate_os_errors(run):
            run.mkdir(parents=True, exist_ok=True)
            if not self._resumed:
                write_text(run / RECIPE_FILE, dump_recipe(recipe))
                if recipe.adapter.changes_base and isinstance(self._model, PeftModel):
                    save_adapter(self._model, run / PISSA_START_FOLDER)
            self._write_json("running", None)

    def write_saving(self, summary: RunSummary) -> None:
        """Write the record of a run that has trained its last step, before its result is written."""
        self._write("saving", summary)

    def write_end(self, summary: RunSummary) -> None:
        """Write the record of a finished run."""
        self._write("finished", summary)

    def _write(self, status: str, summary: RunSummary) -> None:
        run = self._setup.resolved.output
        with translate_os_errors(
            run, f"what the run has written is kept; make room, and end it with {name_option('--resume')}"
        ):
            self._write_json(status, summary)

    def _write_json(self, status: str, summary: RunSummary | None) -> None:
        write_json(self._setup.resolved.output / RECORD_FILE, self._describe(status, summary))

    def _describe(self, status: str, summary: RunSummary | None) -> dict[str, Any]:
        setup, recipe = self._setup, self._setup.resolved.recipe
        return {
            "status": status,
            "resumed": self._resumed,
            "recipe": to_plain(recipe),
            **describe_processes(),
            "base": str(setup.base),
            "base_fingerprint": setup.base_fingerprint,
            "hub": record_hub(recipe),
            "judge_fingerprint": fingerprint_judge(recipe.rewards.judge),
            "data": setup.splits.report.to_json(),
            **describe_environment(),
            **({} if self._speed is None else {"speed": asdict(self._speed)}),
            **({} if self._planned_bytes is None else {"planned_bytes": self._planned_bytes}),
            "result": asdict(summary) if summary else None,
        }


def complete_record(run: Path, title: str, *, is_writer: bool) -> RunSummary | None:
    """Finish the record of a run that was stopped after its result was written; return None where there is more to do, or nothing.

    A result whose record says that the run was still training is removed: the run's last checkpoint gives it again. The writer must
    be the first of several processes to call it.

    Raises:
        TrainingError: the record is damaged, or says nothing of the result; the result is kept.
    """
    result, record = find_result_folder(run), read_run_record(run)
    status = record.get("status")
    if result is None or (status == "finished" and is_writer):
        return None
    if status not in _STATES:
        raise TrainingError(
            f"{run}: holds a result ({result.name}), and {RECORD_FILE} does not say whether it is whole (its status is {status!r}, and "
            f"should be {', '.join(_STATES)}); restore {RECORD_FILE}, or remove {result.name} to train from the newest checkpoint"
        )
    if not is_writer:
        return _read_summary(run, record) if status == "finished" else None
    if status == "running":
        shutil.rmtree(result)
        return None
    summary = _read_summary(run, record)
    draw_losses(run, title)
    with translate_os_errors(run, f"the result is whole; make room, and end the run with {name_option('--resume')}"):
        write_json(run / RECORD_FILE, {**record, "status": "finished"})
    write_report(run)
    return summary


def _read_summary(run: Path, record: dict[str, Any]) -> RunSummary:
    try:
        return RunSummary(**record["result"])
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / RECORD_FILE}: holds no summary of the result; the folder is damaged; restore this file"
        ) from error


@contextlib.contextmanager
def leave_nothing_before_step_one(run: Path, checkpoint: Path | None) -> Iterator[None]:
    """Remove what a fresh run has written when it stops before its first logged step or checkpoint."""
    try:
        yield
    except BaseException:
        if checkpoint is None and not read_metrics(run) and not list_trainer_checkpoints(run):
            remove_made_files(run)
        raise
