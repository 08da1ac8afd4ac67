"""Write the record of a run: `recipe.yaml` and `run.json`; a run that stops before its first step leaves nothing."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.files.folders import translate_os_errors
from finetune.files.json_files import write_json
from finetune.models.lora import save_adapter
from finetune.recipe.sections import dump_recipe, to_plain
from finetune.rewards.judge import fingerprint_judge
from finetune.runs.run_files import PISSA_START_FOLDER, RECIPE_FILE, RECORD_FILE, list_trainer_checkpoints
from finetune.runs.summary import RunSummary
from finetune.training.journal.environment import describe_environment
from finetune.training.journal.progress import read_metrics
from finetune.training.setup import Setup


class RunRecord:
    """Writes what a run is before its first step, and its results after the last one."""

    def __init__(self, setup: Setup, model: PreTrainedModel | PeftModel, *, resumed: bool) -> None:
        self._setup = setup
        self._model = model
        self._resumed = resumed

    def write_start(self) -> None:
        """Write the resolved recipe, the initial adapter of PiSSA, and a record with the status "running"."""
        run, recipe = self._setup.resolved.output, self._setup.resolved.recipe
        with translate_os_errors(run):
            run.mkdir(parents=True, exist_ok=True)
            if not self._resumed:
                (run / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
                if recipe.adapter.changes_base and isinstance(self._model, PeftModel):
                    save_adapter(self._model, run / PISSA_START_FOLDER)
            write_json(run / RECORD_FILE, self._describe("running", None))

    def write_end(self, summary: RunSummary) -> None:
        """Write the record of a finished run."""
        run = self._setup.resolved.output
        with translate_os_errors(run):
            write_json(run / RECORD_FILE, self._describe("finished", summary))

    def _describe(self, status: str, summary: RunSummary | None) -> dict[str, Any]:
        setup, recipe = self._setup, self._setup.resolved.recipe
        return {
            "status": status,
            "resumed": self._resumed,
            "recipe": to_plain(recipe),
            "base": str(setup.base),
            "base_fingerprint": fingerprint_checkpoint(setup.base),
            "judge_fingerprint": fingerprint_judge(recipe.rewards.judge),
            "data": setup.splits.report.to_json(),
            **describe_environment(),
            "result": asdict(summary) if summary else None,
        }


@contextlib.contextmanager
def leave_nothing_before_step_one(run: Path, checkpoint: str | None) -> Iterator[None]:
    """Remove a fresh run's folder when the run stops before its first logged step or checkpoint."""
    try:
        yield
    except BaseException:
        # The folder was empty when this run began, so everything in it is from this run.
        if checkpoint is None and not read_metrics(run) and not list_trainer_checkpoints(run):
            shutil.rmtree(run, ignore_errors=True)
        raise
