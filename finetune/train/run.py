"""One training run: from a checked recipe to a run directory."""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from finetune.checkpoints.finding import find_cache, fingerprint_checkpoint
from finetune.data.dataset import Splits, load_splits
from finetune.data.encoding.template import ChatTemplate, find_template, list_stop_tokens, list_template_tokens
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings
from finetune.files.folders import translate_os_errors
from finetune.models.engine import ENGINE_NAMES, check_engine, find_engine, gather_weights
from finetune.models.loading import Precision, choose_device, choose_precision, load_base
from finetune.models.lora import attach_adapter, continue_adapter, find_untrained_tokens, save_adapter
from finetune.models.reference_model import describe_reference
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe, dump_recipe, to_plain
from finetune.rewards.judge import BorrowingJudge, borrow_base, check_judge, fingerprint_judge
from finetune.rewards.rules import find_reference_rule
from finetune.runs.lineage import find_start
from finetune.runs.results import write_json
from finetune.runs.resuming import check_same_inputs, check_same_recipe, find_resume_point
from finetune.runs.summary import RunSummary, summarise_run
from finetune.train.journal.answers import AnswerSheet, is_sharded
from finetune.train.journal.environment import describe_environment
from finetune.train.journal.loss_plot import draw_losses
from finetune.train.journal.progress import read_metrics
from finetune.train.online import bind_template, set_stop_tokens
from finetune.train.preflight import EvaluationCheck, check_first_batch, check_packed_batch
from finetune.train.pretraining.packed_training import find_states
from finetune.train.pretraining.state_loading import save_states
from finetune.train.result import PISSA_START, Setup, write_result
from finetune.train.trainer import Aids, build_trainer, make_config
from finetune.train.training_rows import read_source_section, read_training_sources

logger = logging.getLogger(__name__)

_ANY_LENGTH = 2**31 - 1


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
    start = _prepare(recipe, config, precision)
    if checkpoint is not None:
        check_same_inputs(
            run, start.splits.report.fingerprint, start.begin.base, fingerprint_judge(recipe.rewards.judge)
        )
    with _leave_nothing_before_step_one(run, checkpoint):
        model, judge = _build_model(start, config, device)
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


def _prepare(recipe: Recipe, config: TrainingArguments, precision: Precision) -> Setup:
    # Downloads, folds and caches are made by one process; the others then find them.
    with config.main_process_first(desc="preparing the start"):
        begin = find_start(recipe.model)
        tokenizer = load_tokenizer(begin.tokenizer_folder)
        template = find_template(recipe.data.template, tokenizer)
        tokenizer.chat_template = template.source
        if recipe.rewards.judge.run:
            check_judge(recipe.rewards.judge.run, begin.base, template)
        states = find_states(recipe)
        splits = load_splits(_read_data_settings(recipe), tokenizer, template, recipe.seed)
    reference = describe_reference(recipe, splits.report.train.rows)
    for note in (*template.notes, *splits.report.notes, *([reference] if reference else [])):
        logger.info("%s", note)
    return Setup(recipe, precision, begin, tokenizer, template, splits, states)


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


def prepare_rows(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Splits]:
    """Return the tokenizer and the rows of a recipe as a run would train them, without loading any weights."""
    settings, tokenizer, template = open_data(recipe)
    return tokenizer, load_splits(settings, tokenizer, template, recipe.seed)


def open_data(recipe: Recipe) -> tuple[DataSettings, PreTrainedTokenizerBase, ChatTemplate]:
    """Return what the rows of a recipe are read and rendered with, before any row is read."""
    tokenizer = load_tokenizer(find_start(recipe.model).tokenizer_folder)
    return _read_data_settings(recipe), tokenizer, find_template(recipe.data.template, tokenizer)


def _read_data_settings(recipe: Recipe) -> DataSettings:
    data = recipe.data
    train, notes = read_training_sources(data)
    return DataSettings(
        train=train,
        shape=METHODS[recipe.method].shape,
        needs_answer=find_reference_rule(recipe.rewards.rules),
        evaluation=tuple(map(read_source_section, data.eval)),
        held_out=data.held_out,
        format=data.format,
        columns=data.columns,
        system=data.system,
        # Packed rows are cut where they are full; a document itself may be of any length.
        max_tokens=data.max_tokens if METHODS[recipe.method].pretraining is None else _ANY_LENGTH,
        overflow=data.overflow,
        train_on=data.train_on,
        substitute=data.substitute,
        deduplicate=data.deduplicate,
        notes=notes,
        workers=data.workers,
        cache=find_cache() / "rows",
    )


def _build_model(
    start: Setup, config: TrainingArguments, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, BorrowingJudge | None]:
    """Return the model to train, and the judge that reads with the same base where the recipe names one."""
    recipe, judge = start.recipe, None
    set_seed(recipe.seed)  # a head for scores begins at random
    base = load_base(start.begin.base, recipe.model, start.precision, device, METHODS[recipe.method].head)
    _warn_of_untrained_tokens(start, base)
    if recipe.rewards.judge.run:
        pad_token, rows = int(start.tokenizer.pad_token_id), config.per_device_train_batch_size
        judge = borrow_base(base, recipe.rewards.judge.run, pad_token, rows)
    if start.begin.adapter is not None:
        return continue_adapter(base, recipe.adapter, start.begin.adapter), judge
    set_seed(recipe.seed)
    return attach_adapter(base, recipe.adapter, start.begin.base), judge


def _warn_of_untrained_tokens(start: Setup, base: PreTrainedModel) -> None:
    adapter = start.recipe.adapter
    control_tokens = list_template_tokens(start.tokenizer, start.template)
    untrained = set(find_untrained_tokens(base, control_tokens)) - set(adapter.train_tokens)
    if untrained and adapter.kind != "none":
        names = ", ".join(f"{start.tokenizer.convert_ids_to_tokens(token)} ({token})" for token in sorted(untrained))
        logger.warning(
            "these tokens of the template look untrained in this start: %s; to train their rows set adapter.train_tokens: %s",
            names,
            sorted(untrained),
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
