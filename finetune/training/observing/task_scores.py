"""Evaluate the model on tasks while it trains: at shares of the run, at its end, or at each evaluation."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.data.encoding.template import list_stop_tokens
from finetune.errors import RecipeError, describe_unknown_name
from finetune.evaluation.asking.asked_model import AskedModel
from finetune.evaluation.sandbox.programs import Program, Verdict, choose_runner
from finetune.evaluation.tasks.run_tasks import PreparedTask, prepare_tasks, score_task
from finetune.evaluation.tasks.task_settings import TaskSettings
from finetune.models.engine import ENGINES, find_engine
from finetune.models.opening import LoadedModel
from finetune.recipe.sections import TaskSection
from finetune.runs.run_files import TASK_SCORES
from finetune.training.setup import Setup

logger = logging.getLogger(__name__)

_BITS = "bits_per_byte"
# So much of a step is rounding where a share of the steps is no whole number.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PlannedTask:
    """A task whose rows are read, with the section of the recipe that asks for it."""

    section: TaskSection
    prepared: PreparedTask

    @property
    def better(self) -> Mapping[str, bool]:
        """Whether more is better, by the names of its scores as a log has them behind `eval_`."""
        form = self.prepared.form
        scores = {measure.name: measure.percent is not None for measure in form.measures}
        if form.generation is not None:
            scores[_BITS] = False
        return {f"{TASK_SCORES}{form.task}/{name}": better for name, better in scores.items()}


def plan_tasks(tasks: Sequence[str | TaskSection], options: Mapping[str, Any]) -> list[PlannedTask]:
    """Read the rows of the tasks that a recipe names, before the model is loaded; `options` are its section trainer.

    Raises:
        FinetuneError: they cannot be read, code cannot be run safely, or this machine cannot evaluate tasks while it trains.
    """
    sections = [section for section in tasks if isinstance(section, TaskSection)]
    if sections and (engine := ENGINES[find_engine()]).shards_weights:
        problem = f"data.tasks: {engine.title} shards the weights, and one process cannot ask the model alone; remove this key"
        raise RecipeError("data", [problem])
    planned = []
    for number, section in enumerate(sections, 1):
        path, exemplars = (Path(file) if file else None for file in (section.path, section.exemplars))
        settings = TaskSettings((section.name,), limit=section.limit, data=path, exemplars=exemplars, chat=section.chat)
        planned += [PlannedTask(section, one) for one in prepare_tasks(settings, _name_keys(number))]
    if any(one.prepared.form.runs_code for one in planned):
        choose_runner(False)
    _check_choice(options, planned)
    return planned


def _name_keys(number: int) -> tuple[str, str]:
    return f"data.tasks[{number}].path", f"data.tasks[{number}].exemplars"


def _check_choice(options: Mapping[str, Any], planned: Sequence[PlannedTask]) -> None:
    """Check that a score by which the best checkpoint is chosen exists and is compared the right way.

    Raises:
        RecipeError: it does not, or is not.
    """
    wanted = _find_choice(options)
    if not wanted.startswith(TASK_SCORES):
        return
    better = {name: value for one in planned for name, value in one.better.items()}
    if wanted not in better:
        unknown = describe_unknown_name(wanted, better) if better else "a score of a task, and data.tasks names none"
        raise RecipeError("trainer", [f"trainer.metric_for_best_model: {wanted!r} is {unknown}"])
    if not better[wanted] and options.get("greater_is_better", True):
        problem = f"trainer.greater_is_better: less is better of {wanted}; set this key to false"
        raise RecipeError("trainer", [problem])
    if any(one.section.every is not None and wanted in one.better for one in planned):
        problem = "data.tasks: every: a task by which the best checkpoint is chosen is evaluated at each evaluation; remove this key"
        raise RecipeError("data", [problem])


def _find_choice(options: Mapping[str, Any]) -> str:
    return str(options.get("metric_for_best_model") or "").removeprefix("eval_")


class TaskScores(TrainerCallback):
    """Asks the model that trains, and logs its scores; the run draws the same random numbers as without it."""

    def __init__(self, trainer: Trainer, setup: Setup, planned: Sequence[PlannedTask]) -> None:
        self._trainer, self._planned = trainer, planned
        stops = tuple(list_stop_tokens(setup.tokenizer, setup.template))
        self._loaded = LoadedModel(trainer.model, setup.tokenizer, setup.template, stops)
        choice = _find_choice(setup.resolved.recipe.trainer)
        self._watched = [one for one in planned if choice in one.better]
        self._runner: Callable[[Program], Verdict] | None = None
        if any(one.prepared.form.runs_code for one in planned):
            self._runner = choose_runner(False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask the tasks that are due after this step, and log their scores."""
        due = [one for one in self._planned if one not in self._watched and _is_due(one.section.every, state)]
        if not due:
            return
        scores = self._ask(due)
        # The trainer's own `log` would also empty the means that it logs of the training.
        logs = {**scores, "epoch": state.epoch}
        state.log_history.append({**logs, "step": state.global_step})
        should_log = control.should_log
        self._trainer.callback_handler.on_log(args, state, control, logs)
        control.should_log = should_log

    def list_names(self) -> list[str]:
        """Return the names of the scores that each evaluation has."""
        return [name for one in self._watched for name in one.better]

    def ask_watched(self) -> dict[str, float]:
        """Return the scores of the task by which the best checkpoint is chosen."""
        return self._ask(self._watched) if self._watched else {}

    def _ask(self, tasks: Sequence[PlannedTask]) -> dict[str, float]:
        """Return the scores by their names in a log; the first process asks, and tells the others."""
        told: list[Any] = [None]
        if self._trainer.is_world_process_zero():
            told = [{name: value for one in tasks for name, value in self._ask_one(one).items()}]
        if self._trainer.args.world_size > 1:
            broadcast_object_list(told)
        scores: dict[str, float] = told[0]
        return scores

    def _ask_one(self, one: PlannedTask) -> dict[str, float]:
        model = self._loaded.model
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():
                result = score_task(AskedModel(self._loaded, chat=one.section.chat), one.prepared, self._runner)
        finally:
            model.train(was_training)
        scores = dict(result.metric)
        if result.bits_per_byte is not None:
            scores[_BITS] = result.bits_per_byte
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        logger.info("step %d: %s: %s", self._trainer.state.global_step, result.task, shown)
        return {f"eval_{TASK_SCORES}{result.task}/{name}": value for name, value in scores.items()}


def _is_due(every: float | None, state: TrainerState) -> bool:
    """Tell whether a share of the run ends with this step; the last step always ends one."""
    step, last = int(state.global_step), int(state.max_steps)
    if step == last or every is None:
        return step == last
    return int(step / (every * last) + _ROUNDING) > int((step - 1) / (every * last) + _ROUNDING)


def add_task_scores(trainer: Trainer, setup: Setup, planned: Sequence[PlannedTask]) -> Sequence[str]:
    """Let a trainer evaluate tasks; return the names of the scores that each of its evaluations has."""
    if not planned:
        return ()
    scores = TaskScores(trainer, setup, planned)
    trainer.add_callback(scores)
    trainer.task_scores = scores
    return scores.list_names()


def include_task_scores(trainer_class: type[Any]) -> type[Any]:
    """Return a trainer class whose evaluations hold the scores of the task that its `task_scores` watch."""
    return type(trainer_class.__name__, (_WithTaskScores, trainer_class), {})


class _WithTaskScores:
    """Overrides a method of `transformers.Trainer`, and must stand before it among the bases of a class."""

    task_scores: TaskScores | None = None

    def evaluation_loop(
        self, dataloader: Any, description: str, *arguments: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> Any:
        """Evaluate the held-out rows, and ask the task."""
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, *arguments, metric_key_prefix=metric_key_prefix, **options
        )
        if metric_key_prefix == "eval" and self.task_scores is not None:
            output.metrics.update(self.task_scores.ask_watched())
        return output
