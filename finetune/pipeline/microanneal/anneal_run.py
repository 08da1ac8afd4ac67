"""Anneal with and without candidate data from the same state, and compare: is the data worth it?"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from finetune.errors import MachineError, OutputError, describe_count
from finetune.evaluation.sandbox.programs import Program, Verdict, choose_runner
from finetune.evaluation.tasks.run_tasks import (
    PreparedTask,
    ask_tasks,
    describe_evaluation,
    prepare_tasks,
    recall_evaluation,
)
from finetune.evaluation.tasks.task_results import Evaluation, make_folder
from finetune.evaluation.tasks.task_settings import TaskSettings
from finetune.evaluation.token_loss import score_rows
from finetune.files.json_files import read_json, write_json
from finetune.files.launcher import is_launched
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.growth.scores.score_lines import make_measured_lines
from finetune.models.opening import LoadedModel, fingerprint_model, open_model
from finetune.pipeline.experiment_folder import hold_experiment
from finetune.pipeline.finishing import REPORTED, check_earlier_run, finish_compared, free_memory
from finetune.pipeline.microanneal.anneal_plan import ARMS, NEW, OLD, ROWS_FOLDER, RUNS_FOLDER, AnnealPlan
from finetune.pipeline.microanneal.anneal_plot import draw_anneal
from finetune.pipeline.microanneal.anneal_report import write_anneal
from finetune.pipeline.microanneal.anneal_results import (
    AnnealLine,
    AnnealReport,
    RowLosses,
    compare_losses,
    compare_scores,
    list_loss_lines,
)
from finetune.pipeline.microanneal.anneal_rows import HELD_OUT, AnnealRows, hash_content, prepare_anneal_rows
from finetune.pipeline.same_speed import describe_choices
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.run_files import HEAD_NORM, Z_TERM, read_metrics
from finetune.training.training_rows import prepare_rows, read_data_settings

logger = logging.getLogger(__name__)

_KEPT = "what was trained and measured is kept; the same command continues"
_CURVES = ("step", "loss", "eval_loss", "learning_rate", HEAD_NORM, Z_TERM)


@dataclass(frozen=True)
class _Tasks:
    """The tasks that models are asked, read once."""

    settings: TaskSettings | None = None
    prepared: Sequence[PreparedTask] = ()
    runner: Callable[[Program], Verdict] | None = None


def run_microanneal(plan: AnnealPlan, tasks: TaskSettings | None = None) -> AnnealReport:
    """Train both runs, measure both, and write the comparison; what an earlier call has done is not done again.

    Raises:
        FinetuneError: the rows, the checkpoint or the folder cannot be used, or a run fails.
    """
    if is_launched():
        raise MachineError("microanneal: cannot run under accelerate launch or torchrun; start it without")
    output = plan.request.output
    asked = _read_tasks(tasks)
    with hold_experiment(output, ROWS_FOLDER, "micro-annealing"):
        rows = prepare_anneal_rows(plan)
        arms = {arm: plan.make_arm(arm, rows.find_file(arm), rows.find_file(HELD_OUT)) for arm in ARMS}
        for resolved in arms.values():
            check_earlier_run(resolved)
        with _leave_nothing_before_step_one(output):
            runs = {arm: _train(arm, ARMS[arm], resolved) for arm, resolved in arms.items()}
        speed = describe_choices({ARMS[arm]: resolved.output for arm, resolved in arms.items()})
        lines = _compare_arms(plan, rows, arms, asked)
        if plan.request.tuning is not None:
            tuned, found = _tune(plan, arms, asked)
            runs |= {f"{arm}, fine-tuned": summary for arm, summary in tuned.items()}
            lines += found
            speed += describe_choices({ARMS[arm]: Path(run["run"]) for arm, run in tuned.items()}, "fine-tunings")
        notes = [*read_data_settings(plan.reading).notes, *(one.describe() for one in rows.accounts), *rows.notes]
        if rows.cut:
            limit = plan.reading.recipe.data.max_tokens
            notes.append(
                f"{describe_count(rows.cut, 'held-out text is', 'held-out texts are')} cut at data.max_tokens: {limit}"
            )
        request = plan.request
        report = AnnealReport(
            str(output),
            tuple(map(str, request.candidate)),
            request.share,
            plan.tokens,
            request.start,
            tuple(lines),
            runs,
            {arm: _read_curve(resolved) for arm, resolved in arms.items()},
            (*notes, *speed, *(note for one in asked.prepared for note in one.notes)),
        )
        with translate_os_errors(output, _KEPT):
            draw_anneal(report, output)
            write_anneal(report, output)
    return report


@contextmanager
def _leave_nothing_before_step_one(output: Path) -> Iterator[None]:
    """Remove the rows where the first run stops before its first step, and so leaves nothing itself."""
    try:
        yield
    except BaseException:
        if not any((output / RUNS_FOLDER).glob("*")):
            shutil.rmtree(output / ROWS_FOLDER, ignore_errors=True)
        raise


def _read_tasks(settings: TaskSettings | None) -> _Tasks:
    if settings is None:
        return _Tasks()
    prepared = prepare_tasks(settings)
    runner = choose_runner(settings.unsafe_code) if any(one.form.runs_code for one in prepared) else None
    return _Tasks(settings, prepared, runner)


def _train(name: str, title: str, resolved: ResolvedRecipe) -> dict[str, Any]:
    logger.info("%s: %s", name, title)
    summary = finish_compared(resolved, resolved.output.parent.glob("*")).summary
    free_memory()
    return {key: summary[key] for key in REPORTED}


def _read_curve(resolved: ResolvedRecipe) -> list[dict[str, Any]]:
    lines = [{key: line[key] for key in _CURVES if key in line} for line in read_metrics(resolved.output)]
    return [line for line in lines if len(line) > 1]


def _compare_arms(
    plan: AnnealPlan, rows: AnnealRows, arms: dict[str, ResolvedRecipe], asked: _Tasks
) -> list[AnnealLine]:
    """Measure both results on the held-out rows and the tasks, and compare."""
    tokenized = [{"input_ids": row.token_ids, "labels": row.token_ids} for row in rows.held_out]
    losses, tokens, evaluations = {}, numpy.zeros(0), []
    for arm, resolved in arms.items():
        measured = _Measured(str(resolved.output), plan.request.output / "measured" / arm, asked)
        losses[arm], tokens = measured.measure_losses(tokenized)
        evaluations += measured.ask(chat=False)
        measured.close()
    sources, counted = [row.source for row in rows.held_out], [row.counted for row in rows.held_out]
    lines = list_loss_lines(sources, counted, losses, tokens)
    return lines + list(compare_scores("annealed", make_measured_lines(asked.prepared, evaluations, "measured")))


def _tune(
    plan: AnnealPlan, arms: dict[str, ResolvedRecipe], asked: _Tasks
) -> tuple[dict[str, dict[str, Any]], list[AnnealLine]]:
    """Fine-tune both results in the same way, measure both on the held-out rows of that recipe and on the tasks, and compare."""
    assert plan.request.tuning is not None
    losses, tokens, evaluations, runs = {}, numpy.zeros(0), [], {}
    for arm, resolved in arms.items():
        tuned = plan.make_tuning(str(resolved.output), arm)
        check_earlier_run(tuned)
        runs[arm] = _train(arm, "the fine-tuning after it", tuned)
        held = prepare_rows(tuned)[1].evaluation
        measured = _Measured(str(tuned.output), plan.request.output / "measured" / f"{arm}-tuned", asked)
        if held is not None:
            held_rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in held]
            losses[arm], tokens = measured.measure_losses(held_rows)
        evaluations += measured.ask(chat=plan.request.tuning.chat)
        measured.close()
    lines = []
    if losses:
        lines.append(
            compare_losses("held-out rows of its recipe", "tuned", RowLosses(losses[OLD], losses[NEW], tokens))
        )
    return runs, lines + list(compare_scores("tuned", make_measured_lines(asked.prepared, evaluations, "tuned")))


class _Measured:
    """A model whose losses and answers are measured, and kept in a folder; it is opened only if something is missing there."""

    def __init__(self, name: str, folder: Path, asked: _Tasks) -> None:
        self._name, self._folder, self._asked = name, folder, asked
        self._fingerprint = fingerprint_model(name)
        self._loaded: LoadedModel | None = None

    def _open(self) -> LoadedModel:
        self._loaded = self._loaded or open_model(self._name)
        return self._loaded

    def close(self) -> None:
        """Free the memory of the model."""
        self._loaded = None
        free_memory()

    def measure_losses(self, rows: Sequence[dict[str, list[int]]]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return the summed loss of each row in nats, and its trained tokens.

        Raises:
            OutputError: the folder holds those of other weights or rows.
        """
        file = self._folder / "losses.json"
        identity = hash_content([self._fingerprint, rows])
        written = read_json(file)
        if written is None:
            logger.info("%s: reading %d held-out rows", self._name, len(rows))
            found = list(score_rows(self._open(), rows))
            written = {
                "identity": identity,
                "losses": [one.loss for one in found],
                "tokens": [one.tokens for one in found],
            }
            with translate_os_errors(self._folder, _KEPT):
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(file, written)
        elif written.get("identity") != identity:
            raise OutputError(f"{file}: is of other weights or rows; remove it, or choose another folder with -o")
        return numpy.array(written["losses"]), numpy.array(written["tokens"], dtype=numpy.float64)

    def ask(self, *, chat: bool) -> list[Evaluation]:
        """Return the scores on the tasks: one evaluation, or none where no tasks are asked."""
        if self._asked.settings is None:
            return []
        settings = replace(self._asked.settings, chat=chat)
        folder = self._folder / "tasks"
        found = recall_evaluation(self._name, self._fingerprint, self._asked.prepared, settings, folder)
        if found is None:
            described = describe_evaluation(self._fingerprint, self._asked.prepared, settings)
            make_folder(folder, described)
            found = ask_tasks(
                settings.ask_with(self._open()), self._name, self._asked.prepared, settings, folder, self._asked.runner
            )
        return [found]
