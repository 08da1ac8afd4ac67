"""One training run: from a checked recipe to a run directory."""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer, set_seed

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.data.encoding.template import list_stop_tokens
from finetune.files.folders import translate_os_errors
from finetune.files.json_files import write_json
from finetune.models.engine import ENGINE_NAMES, check_engine, find_engine, gather_weights
from finetune.models.lora import save_adapter
from finetune.models.precision import choose_device, choose_precision
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe, dump_recipe, to_plain
from finetune.rewards.judge import fingerprint_judge
from finetune.runs.lineage import find_start
from finetune.runs.resuming import check_same_inputs, check_same_recipe, find_resume_point
from finetune.runs.summary import RunSummary
from finetune.train.journal.answers import AnswerSheet, is_sharded
from finetune.train.journal.environment import describe_environment
from finetune.train.journal.loss_plot import draw_losses
from finetune.train.journal.progress import read_metrics
from finetune.train.journal.summarising import summarise_run
from finetune.train.online import bind_template, set_stop_tokens
from finetune.train.preflight import EvaluationCheck, check_first_batch, check_packed_batch
from finetune.train.pretraining.state_loading import save_states
from finetune.train.result import PISSA_START, write_result
from finetune.train.setup import Setup, build_model, prepare
from finetune.train.trainer import Aids, build_trainer, make_config
from finetune.train.training_rows import prepare_rows

logger = logging.getLogger(__name__)


def run_training(recipe: Recipe, resume: bool = False) -> RunSummary:
    """Train what a checked recipe says and leave a run directory.

    Raises:
        FinetuneError: anything of the user's that stops the run; before step 1 nothing is left behind.
    """
    started = time.monotonic()
    run = Path(recipe.output)
    device = choose_device(bool(recipe.trainer.get("use_cpu")))
    check_engine(recipe, find_engine())
    pretrains = METHODS[recipe.method].pretraining is not None
    precision = choose_precision(recipe.model.dtype, device, recipe.adapter.kind == "none", keeps_masters=pretrains)
    config = make_config(recipe, bool(recipe.data.eval or recipe.data.held_out), precision)
    checkpoint = find_resume_point(recipe, run, resume) if config.process_index == 0 or resume else None
    start = prepare(recipe, config, precision)
    if checkpoint is not None:
        check_same_inputs(
            run, start.splits.report.fingerprint, start.begin.base, fingerprint_judge(recipe.rewards.judge)
        )
    with _leave_nothing_before_step_one(run, checkpoint):
        model, judge = build_model(start, config, device)
        sheet = _open_answers(start)
        tokenizer = start.tokenizer
        if METHODS[recipe.method].is_online:
            tokenizer = bind_template(tokenizer, start.template)
            set_stop_tokens(model, list_stop_tokens(tokenizer, start.template))
        trainer = build_trainer(recipe, model, tokenizer, start.splits, precision, Aids(start.states, judge))
        _check_rows(trainer, start)
        _describe_work(trainer, start)
        if trainer.is_world_process_zero():
            _write_run_files(run, start, model, status="running", resumed=checkpoint is not None)
            if sheet is not None and checkpoint is None:
                sheet.write_before(model)
        # Processes that write answers must not all write the same ones.
        set_seed(recipe.seed + (config.process_index if METHODS[recipe.method].is_online else 0))
        with translate_os_errors(run):
            output = trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarise_run(trainer, run, output.global_step, time.monotonic() - started)
    weights = gather_weights(trainer)
    if trainer.is_world_process_zero():
        if sheet is not None and not is_sharded(trainer):
            sheet.write_after(model)
        write_result(run, start, model, trainer, weights)
        draw_losses(run, f"{recipe.method} from {Path(recipe.model.checkpoint).name}")
        _write_run_files(run, start, model, status="finished", resumed=checkpoint is not None, summary=summary)
    elif recipe.optimizer.save_states:
        save_states(run, trainer.optimizer, is_writer=False)
    trainer.accelerator.wait_for_everyone()
    return summary


def _open_answers(start: Setup) -> AnswerSheet | None:
    if not start.recipe.answers or METHODS[start.recipe.method].head == "score":
        return None
    rows = start.splits.train if start.splits.evaluation is None else start.splits.evaluation
    return AnswerSheet(Path(start.recipe.output), start.tokenizer, start.template, rows, start.recipe.answers)


def _check_rows(trainer: Trainer, start: Setup) -> None:
    """Look at the first batch, and have the longest held-out rows tried before step 1."""
    report = start.splits.report
    method = METHODS[start.recipe.method]
    if method.pretraining is not None:
        check_packed_batch(trainer)
    elif not method.is_online:  # which trains on answers that are not there yet
        # Texts that are split, and answers that a recipe lets be cut, may fill a batch without any end.
        may_lack_ends = "text" in report.formats.values() or report.train.answers_cut > 0
        stop_tokens = [] if may_lack_ends else list_stop_tokens(start.tokenizer, start.template)
        check_first_batch(trainer, start.tokenizer, stop_tokens)
    if start.splits.evaluation is not None:
        trainer.add_callback(EvaluationCheck(trainer))


def check_finished_run(recipe: Recipe) -> None:
    """Make sure that the run in a recipe's output is of this recipe, these rows and this base.

    Raises:
        TrainingError: something of it has changed since.
    """
    run = Path(recipe.output)
    check_same_recipe(run / "recipe.yaml", dump_recipe(recipe), "run")
    _, splits = prepare_rows(recipe)
    check_same_inputs(
        run, splits.report.fingerprint, find_start(recipe.model).base, fingerprint_judge(recipe.rewards.judge)
    )


@contextlib.contextmanager
def _leave_nothing_before_step_one(run: Path, checkpoint: str | None) -> Iterator[None]:
    """Remove a fresh run's folder when the run stops before its first logged step or checkpoint."""
    try:
        yield
    except BaseException:
        # The folder was empty when this run began, so all that is in it is ours.
        if checkpoint is None and not read_metrics(run) and not list(run.glob("checkpoint-*")):
            shutil.rmtree(run, ignore_errors=True)
        raise


def _describe_work(trainer: Trainer, start: Setup) -> None:
    config, report = trainer.args, start.splits.report
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    logger.info("rows: %s", report.describe())
    logger.info(
        "each step: %d rows (%d a device x %d accumulated x %d %s)",
        batch,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.world_size,
        "process" if config.world_size == 1 else f"processes, {ENGINE_NAMES[find_engine()]}",
    )
    logger.info("training %s parameters on %s", f"{trainable:,}", config.device)


def _write_run_files(
    run: Path,
    start: Setup,
    model: PreTrainedModel | PeftModel,
    *,
    status: str,
    resumed: bool,
    summary: RunSummary | None = None,
) -> None:
    with translate_os_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        if summary is None and not resumed:
            (run / "recipe.yaml").write_text(dump_recipe(start.recipe), encoding="utf-8")
            if start.recipe.adapter.init == "pissa" and isinstance(model, PeftModel):
                save_adapter(model, run / PISSA_START)
        record: dict[str, Any] = {
            "status": status,
            "resumed": resumed,
            "recipe": to_plain(start.recipe),
            "base": str(start.begin.base),
            "base_fingerprint": fingerprint_checkpoint(start.begin.base),
            "judge_fingerprint": fingerprint_judge(start.recipe.rewards.judge),
            "data": start.splits.report.to_json(),
            **describe_environment(),
            "result": asdict(summary) if summary else None,
        }
        write_json(run / "run.json", record)
