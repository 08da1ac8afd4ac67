"""One training run, from a resolved recipe to a run directory. Read it from top to bottom."""

import time

from transformers import Trainer, set_seed

from finetune.data.encoding.template import list_stop_tokens
from finetune.files.folders import translate_os_errors
from finetune.models.engine import check_engine, find_engine, gather_weights
from finetune.models.precision import choose_device, choose_run_precision
from finetune.recipe.sections import dump_recipe
from finetune.rewards.judge import fingerprint_judge
from finetune.runs.lineage import find_training_base
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import check_same_inputs, check_same_recipe, find_resume_point
from finetune.runs.run_files import RECIPE_FILE
from finetune.runs.summary import RunSummary
from finetune.training.journal.answers import AnswerSheet, is_sharded
from finetune.training.journal.loss_plot import draw_losses
from finetune.training.journal.run_record import RunRecord, leave_nothing_before_step_one
from finetune.training.journal.summarising import describe_work, summarise_run
from finetune.training.preflight import EvaluationCheck, check_first_batch, check_packed_batch
from finetune.training.pretraining.state_loading import save_states
from finetune.training.result import write_result
from finetune.training.setup import Setup, TrainedModel, build_model, prepare
from finetune.training.trainer import Aids, add_journal, build_trainer, make_config
from finetune.training.training_rows import prepare_rows


def run_training(resolved: ResolvedRecipe, resume: bool = False) -> RunSummary:
    """Train what a recipe says and leave a run directory.

    Raises:
        FinetuneError: anything of the user's that stops the run; before step 1 nothing is left behind.
    """
    started = time.monotonic()
    recipe, run = resolved.recipe, resolved.output
    # The device, the precision and the trainer's options: what is wrong with them is said before any work is done.
    device = choose_device(resolved.uses_cpu)
    check_engine(resolved, find_engine())
    precision = choose_run_precision(resolved, device)
    config = make_config(resolved, resolved.evaluates, precision)
    # A fresh run needs an empty folder; a resumed one needs the recipe, rows, base and reward model that it began with.
    checkpoint = find_resume_point(recipe, run, resume) if config.process_index == 0 or resume else None
    setup = prepare(resolved, config, precision)
    if checkpoint is not None:
        check_same_inputs(run, setup.rows_fingerprint, setup.base, fingerprint_judge(recipe.rewards.judge))
    with leave_nothing_before_step_one(run, checkpoint):
        trained = build_model(setup, config, device)
        aids = Aids(setup.states, trained.judge)
        trainer = build_trainer(resolved, trained.model, trained.tokenizer, setup.splits, precision, aids)
        add_journal(trainer, run)
        # What will really be trained is looked at before step 1.
        _check_rows(trainer, setup)
        describe_work(trainer, setup.splits.report)
        record = RunRecord(setup, trained.model, resumed=checkpoint is not None)
        sheet = _open_answers(setup)
        if trainer.is_world_process_zero():
            record.write_start()
            if sheet is not None and checkpoint is None:
                sheet.write_before(trained.model)
        # Processes that generate answers must not all generate the same ones.
        set_seed(recipe.seed + (config.process_index if resolved.method.is_online else 0))
        with translate_os_errors(run):
            output = trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarise_run(trainer, run, output.global_step, time.monotonic() - started)
    _write_results(setup, trainer, trained, sheet)
    if trainer.is_world_process_zero():
        record.write_end(summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def _open_answers(setup: Setup) -> AnswerSheet | None:
    """Return the sheet of answers before and after, where the recipe keeps answers and the model can generate."""
    resolved = setup.resolved
    if not resolved.recipe.answers or resolved.method.trains_reward_model:
        return None
    return AnswerSheet(resolved.output, setup.tokenizer, setup.template, setup.sample_rows, resolved.recipe.answers)


def _check_rows(trainer: Trainer, setup: Setup) -> None:
    """Look at the first batch, and have the longest held-out rows tried before step 1."""
    report, method = setup.splits.report, setup.resolved.method
    if method.is_pretraining:
        check_packed_batch(trainer)
    elif not method.is_online:  # which trains on answers that are not there yet
        # Texts that are split, and answers that a recipe lets be cut, may fill a batch without any stop token.
        may_lack_stops = "text" in report.formats.values() or report.train.answers_cut > 0
        stop_tokens = [] if may_lack_stops else list_stop_tokens(setup.tokenizer, setup.template)
        check_first_batch(trainer, setup.tokenizer, stop_tokens)
    if setup.splits.evaluation is not None:
        trainer.add_callback(EvaluationCheck(trainer))


def _write_results(setup: Setup, trainer: Trainer, trained: TrainedModel, sheet: AnswerSheet | None) -> None:
    """Write answers, weights and the plot. Every process must call it; those that hold shares of weights send them."""
    run, recipe = setup.resolved.output, setup.resolved.recipe
    weights = gather_weights(trainer)
    if trainer.is_world_process_zero():
        if sheet is not None and not is_sharded(trainer):
            sheet.write_after(trained.model)
        write_result(run, setup, trained.model, trainer, weights)
        draw_losses(run, setup.title)
    elif recipe.optimizer.save_states:
        save_states(run, trainer.optimizer, is_writer=False)


def check_finished_run(resolved: ResolvedRecipe) -> None:
    """Make sure that the run in a recipe's output is of this recipe, these rows and this base.

    Raises:
        TrainingError: something of it has changed since.
    """
    recipe, run = resolved.recipe, resolved.output
    check_same_recipe(run / RECIPE_FILE, dump_recipe(recipe), "run")
    _, splits = prepare_rows(resolved)
    base, judge = find_training_base(resolved), fingerprint_judge(recipe.rewards.judge)
    check_same_inputs(run, splits.report.fingerprint, base, judge)
