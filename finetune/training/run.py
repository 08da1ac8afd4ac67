"""Train a resolved recipe and write its run directory. `run_training` is the story of a run; the helpers follow in its order."""

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from finetune.api_arguments import name_option
from finetune.checkpoints.hub_names import read_hub_record
from finetune.compat import skip_steps
from finetune.data.encoding.template import list_stop_tokens
from finetune.errors import RecipeError
from finetune.files.launcher import is_launched
from finetune.files.safety.disk_errors import translate_damaged_states, translate_lost_workers, translate_os_errors
from finetune.hub.commits import pin_commits
from finetune.models.engine import (
    ENGINES,
    check_engine,
    check_launch_precision,
    describe_idle_gpus,
    find_engine,
    gather_weights,
    load_whole,
    translate_lost_processes,
)
from finetune.models.precision import Precision, choose_device, choose_precision
from finetune.recipe.sections import dump_recipe
from finetune.rewards.judge import fingerprint_judge
from finetune.runs.lineage import find_training_base
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import check_same_inputs, check_same_recipe, find_resume_point, hold_output
from finetune.runs.run_files import RECIPE_FILE, RECORD_FILE
from finetune.runs.summary import RunSummary
from finetune.runs.trainer_checkpoints import check_states, has_stopped_early, read_last_step
from finetune.training.journal.answers import AnswerSheet
from finetune.training.journal.loss_plot import draw_losses
from finetune.training.journal.processes import (
    check_same_processes,
    check_same_recipes,
    check_same_rows,
    list_state_files,
)
from finetune.training.journal.run_record import RunRecord, complete_record, leave_nothing_before_step_one
from finetune.training.journal.safeguards import BaseWatch
from finetune.training.journal.summarising import describe_work, summarise_run
from finetune.training.observing.evaluated_answers import AnswerWriter
from finetune.training.observing.measured_rows import MEASURES, RowSheet, SheetLimits, count_measured
from finetune.training.observing.task_scores import add_task_scores, plan_tasks
from finetune.training.option_trials import check_optimizer
from finetune.training.preflight import EvaluationCheck, check_first_batch, check_packed_batch
from finetune.training.pretraining.state_loading import save_states
from finetune.training.result import CheckpointOrigin, write_result
from finetune.training.setup import Setup, TrainedModel, build_model, prepare
from finetune.training.speed.flash_attention import keep_order_of_sums
from finetune.training.speed.speed_trial import try_speed
from finetune.training.speed.ways import check_choice, read_choice
from finetune.training.trainer import MethodInputs, add_journal, build_trainer, make_config
from finetune.training.training_rows import prepare_rows
from finetune.watching.board_page import write_report

logger = logging.getLogger(__name__)

_LEFT = f"what was saved before is whole: make room, and continue with {name_option('--resume')}"


def run_training(
    resolved: ResolvedRecipe,
    resume: bool = False,
    planned_bytes: int | None = None,
    shared: frozenset[str] | None = None,
) -> RunSummary:
    """Train what a recipe says and write a run directory. `planned_bytes` is the peak memory of its plan, if one was made.

    `shared` are the ways to train faster that the runs which it is compared with have chosen: it uses no others.

    Raises:
        FinetuneError: the user can mend what stopped the run; before step 1 nothing is left behind.
    """
    started = time.monotonic()
    # Options that cannot work are refused before any work is done.
    device, precision, config = configure(resolved)
    if is_launched():
        check_same_recipes(resolved.recipe, resume=resume)
    is_writer = config.process_index == 0
    with (
        hold_output(resolved.output, "run", resume=resume) if is_writer else contextlib.nullcontext(),
        pin_commits(read_hub_record(resolved.output / RECORD_FILE) if resume else ()),
    ):
        checkpoint = None
        if resume:
            check_same_processes(resolved.output)
            check_choice(resolved.output, device)
            if (summary := _complete(resolved, config)) is not None:
                return summary
            checkpoint = find_resume_point(resolved.recipe, resolved.output)
        tasks = plan_tasks(resolved.recipe.data.tasks, resolved.recipe.trainer)
        setup = prepare(resolved, config, precision)
        watch = BaseWatch(setup.base) if device.type == "cpu" or resolved.recipe.model.stream_layers else None
        check_same_rows(setup.rows_fingerprint, setup.base_fingerprint)
        if checkpoint is not None:
            _check_same_run(setup)
        with leave_nothing_before_step_one(resolved.output, checkpoint) if is_writer else contextlib.nullcontext():
            with load_whole(config):
                trained = build_model(setup, config, device, resumes=checkpoint is not None)
            inputs = MethodInputs(setup.states, trained.judge)
            trainer = build_trainer(resolved, trained.model, trained.tokenizer, setup.splits, precision, inputs)
            for callback in (CheckpointOrigin(setup), *([watch] if watch else [])):  # before a checkpoint is sealed
                trainer.add_callback(callback)
            add_journal(trainer, resolved.output, chooses_interval="logging_steps" not in resolved.recipe.trainer)
            _check_rows(trainer, setup, add_task_scores(trainer, setup, tasks))
            describe_work(trainer, setup.splits.report)
            resumes = checkpoint is not None
            earlier = read_choice(resolved.output) if resumes and resolved.recipe.model.speed == "auto" else None
            record = RunRecord(setup, trained.model, resumed=resumes, speed=earlier, planned_bytes=planned_bytes)
            sheets = _open_sheets(setup, trainer)
            if is_writer:
                record.write_start()
                with translate_os_errors(resolved.output):
                    for sheet in sheets:
                        if checkpoint is None:
                            sheet.write_before(trained.model)
                        else:
                            sheet.check_before()
            with keep_order_of_sums(), try_speed(trainer, resolved, record.note_speed, earlier, shared):
                steps = _train(resolved, trainer, checkpoint)
        seconds = time.monotonic() - started
        summary = summarise_run(trainer, resolved.output, steps, seconds, resumed=checkpoint is not None)
        with translate_os_errors(resolved.output, _LEFT):
            if is_writer:
                record.write_saving(summary)
            _write_results(setup, trainer, trained, sheets)
            if is_writer:
                record.write_end(summary)
                write_report(resolved.output)
        trainer.accelerator.wait_for_everyone()
    return summary


def _complete(resolved: ResolvedRecipe, config: TrainingArguments) -> RunSummary | None:
    """Finish a run that was stopped after its result was written; return None where there is more to do."""
    with config.main_process_first(desc="finishing a run that has its result"):
        return complete_record(resolved.output, resolved.title, is_writer=config.process_index == 0)


def configure(resolved: ResolvedRecipe) -> tuple[torch.device, Precision, TrainingArguments]:
    """Choose the device and the precision, and make the trainer's configuration.

    Raises:
        FinetuneError: the machine or the engine cannot do what the recipe asks, or the trainer refuses an option.
    """
    device = choose_device(resolved.uses_cpu)
    check_engine(resolved, find_engine())
    if (
        resolved.recipe.trainer.get("activation_offloading") and device.type == "cpu"
    ):  # a plan for a GPU may be made here
        problem = "trainer.activation_offloading: moves activations off a GPU, and there is none; remove this key"
        raise RecipeError("trainer", [problem])
    if resolved.recipe.adapter.dora and resolved.recipe.model.quantize == "int8" and device.type == "cpu":
        problem = "adapter.dora: cannot be trained on int8 weights on a CPU, where PEFT 0.21 loses their scales; set model.quantize: nf4 or none"
        raise RecipeError("adapter", [problem])
    dtype, pretrains = resolved.recipe.model.dtype, resolved.method.is_pretraining
    precision = choose_precision(dtype, device, resolved.trains_all_weights, keeps_masters=pretrains)
    check_launch_precision(precision.autocast)
    config = make_config(resolved, resolved.evaluates, precision)
    if (idle := describe_idle_gpus(device)) is not None:
        logger.info("%s", idle)
    if not pretrains:  # whose optimizer and schedule are the kit's own
        check_optimizer(config, resolved.recipe.trainer)
    return device, precision, config


def _check_same_run(setup: Setup) -> None:
    """Compare rows, base and reward model with those that a resumed run began with.

    Raises:
        TrainingError: one of them has changed.
    """
    judge = fingerprint_judge(setup.resolved.recipe.rewards.judge)
    check_same_inputs(setup.resolved.output, setup.rows_fingerprint, setup.base, judge)


def _check_rows(trainer: Trainer, setup: Setup, scores: Sequence[str]) -> None:
    """Check the first batch, and let the trainer evaluate the longest held-out rows before step 1.

    `scores` are what an evaluation measures besides.

    Raises:
        TrainingError: the first batch would not train what it should.
    """
    report, method = setup.splits.report, setup.resolved.method
    if method.is_pretraining:
        check_packed_batch(trainer)
    elif not method.is_online:  # an online method has no answers to check yet
        # A text that was split, or an answer that was cut as the recipe allows, may lack its stop token.
        may_lack_stops = "text" in report.formats.values() or report.train.answers_cut > 0
        stop_tokens = [] if may_lack_stops else list_stop_tokens(setup.tokenizer, setup.template)
        check_first_batch(trainer, setup.tokenizer, stop_tokens)
    if setup.splits.evaluation is not None:
        trainer.add_callback(EvaluationCheck(trainer, scores))


def _open_sheets(setup: Setup, trainer: Trainer) -> list[AnswerSheet | RowSheet]:
    """Return what is written before and after the training: the answers and the losses of rows, where the model can give them.

    The trainer also writes the answers at each of its evaluations.
    """
    resolved, recipe = setup.resolved, setup.resolved.recipe
    if not (recipe.answers or recipe.row_losses != 0) or resolved.method.trains_reward_model:
        return []
    if (engine := ENGINES[find_engine()]).shards_weights:
        logger.info(
            "no answers and no losses of rows are written: %s shards the weights, and one process cannot compute alone",
            engine.title,
        )
        return []
    sheets: list[AnswerSheet | RowSheet] = []
    if recipe.answers:
        answers = AnswerSheet(resolved.output, setup.tokenizer, setup.template, setup.sample_rows, recipe.answers)
        trainer.add_callback(AnswerWriter(resolved.output, answers, trainer.model))
        sheets.append(answers)
    if recipe.row_losses != 0 and resolved.method.shape in MEASURES:
        batch = trainer.args.per_device_train_batch_size
        limits = SheetLimits(
            count_measured(recipe.row_losses, trainer), recipe.data.max_tokens, batch, trainer.accelerator.autocast
        )
        sheets.append(RowSheet(resolved.output, setup.splits.train, setup.tokenizer, resolved.method.shape, limits))
    return sheets


def _train(resolved: ResolvedRecipe, trainer: Trainer, checkpoint: Path | None) -> int:
    """Train to the end and return the number of the last step."""
    # Each process of an online method must sample answers of its own.
    offset = trainer.args.process_index if resolved.method.is_online else 0
    set_seed(resolved.recipe.seed + offset)
    if checkpoint is None:
        with translate_os_errors(resolved.output, _LEFT), translate_lost_workers(), translate_lost_processes():
            return int(trainer.train().global_step)
    step, last = read_last_step(checkpoint)
    check_states(checkpoint, list_state_files())
    with (
        translate_os_errors(resolved.output, _LEFT),
        translate_lost_workers(),
        translate_lost_processes(),
        translate_damaged_states(checkpoint),
        skip_steps(trainer) if step >= last or has_stopped_early(checkpoint) else contextlib.nullcontext(),
    ):
        return int(trainer.train(resume_from_checkpoint=str(checkpoint)).global_step)


def _write_results(
    setup: Setup, trainer: Trainer, trained: TrainedModel, sheets: Sequence[AnswerSheet | RowSheet]
) -> None:
    """Write the answers and the losses of rows after training, the weights and the loss plot.

    Every process must call it: where weights are sharded, all of them send their shares to the first.
    """
    run, recipe = setup.resolved.output, setup.resolved.recipe
    weights = gather_weights(trainer)
    if trainer.is_world_process_zero():
        for sheet in sheets:
            sheet.write_after(trained.model)
        write_result(run, setup, trained.model, trainer, weights)
        draw_losses(run, setup.resolved.title)
    elif recipe.optimizer.save_states:
        save_states(run, trainer.optimizer, is_writer=False)


def check_finished_run(resolved: ResolvedRecipe) -> None:
    """Check that a finished run was trained with this recipe, on these rows and from this base checkpoint.

    Raises:
        TrainingError: one of them has changed since.
    """
    recipe, run = resolved.recipe, resolved.output
    check_same_recipe(run / RECIPE_FILE, dump_recipe(recipe), "run")
    with pin_commits(read_hub_record(run / RECORD_FILE)):
        _, splits = prepare_rows(resolved)
        base, judge = find_training_base(resolved), fingerprint_judge(recipe.rewards.judge)
        check_same_inputs(run, splits.report.fingerprint, base, judge)
