"""Log what a run is about to do, and summarise what it has done."""

import logging
from pathlib import Path

from transformers import Trainer

from finetune.data.account import DataReport
from finetune.models.engine import ENGINE_NAMES, find_engine
from finetune.runs.summary import RunSummary

logger = logging.getLogger(__name__)


def describe_work(trainer: Trainer, report: DataReport) -> None:
    """Log the rows, the effective batch size and the number of trained parameters."""
    config = trainer.args
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    logger.info("rows: %s", report.describe())
    logger.info(
        "effective batch size: %d rows (micro-batch size %d x %d accumulation steps x %d %s)",
        batch,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.world_size,
        "process" if config.world_size == 1 else f"processes, {ENGINE_NAMES[find_engine()]}",
    )
    logger.info("training %s parameters on %s", f"{trainable:,}", config.device)


def summarise_run(trainer: Trainer, run: Path, steps: int, seconds: float) -> RunSummary:
    """Return the summary of a finished run; evaluate once more where the last step was not evaluated."""
    # Every process has the trainer's history; only the first writes the file.
    lines = trainer.state.log_history
    if trainer.eval_dataset is not None and not any(line["step"] == steps and "eval_loss" in line for line in lines):
        trainer.evaluate()

    def last(*names: str) -> float | None:
        return next((line[name] for name in names for line in reversed(lines) if name in line), None)

    loss = last("loss", "train_loss")  # a run of fewer steps than trainer.logging_steps has only its mean
    return RunSummary(
        run=str(run),
        steps=steps,
        tokens=int(last("num_tokens") or last("num_input_tokens_seen") or 0),
        train_loss=float("nan") if loss is None else loss,
        eval_loss=last("eval_loss"),
        train_reward=last("reward"),
        eval_reward=last("eval_reward"),
        seconds=round(seconds, 1),
    )
