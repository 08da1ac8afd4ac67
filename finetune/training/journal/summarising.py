"""Log what a run is about to do, and summarise what it has done."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from finetune.data.account import DataReport
from finetune.errors import describe_count
from finetune.models.engine import ENGINES, find_engine
from finetune.runs.run_files import count_tokens_seen
from finetune.runs.summary import RunSummary
from finetune.training.training_rows import count_step_rows

logger = logging.getLogger(__name__)

# TRL's share of prompts whose answers all got the same reward.
_EQUAL_REWARDS = "frac_reward_zero_std"


def describe_work(trainer: Trainer, report: DataReport) -> None:
    """Log the rows, the effective batch size and the number of trained parameters."""
    config = trainer.args
    batch = count_step_rows(config)
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    logger.info("rows: %s", report.describe())
    logger.info(
        "effective batch size: %s (micro-batch size %d x %d accumulation steps x %d %s)",
        describe_count(batch, "row"),
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.world_size,
        "process" if config.world_size == 1 else f"processes, {ENGINES[find_engine()].title}",
    )
    logger.info("training %s parameters on %s", f"{trainable:,}", config.device)


def summarise_run(trainer: Trainer, run: Path, steps: int, seconds: float, *, resumed: bool) -> RunSummary:
    """Return the summary of a finished run; evaluate once more where the last step was not evaluated."""
    # Every process has the trainer's history; only the first writes the file.
    lines = trainer.state.log_history
    best = _find_best_step(trainer)
    measured = steps if best is None else best
    if trainer.eval_dataset is not None and not any(line["step"] == measured and "eval_loss" in line for line in lines):
        trainer.evaluate()
        measured = steps
    kept = [line for line in lines if line["step"] <= measured or "train_loss" in line]

    def last(*names: str) -> float | None:
        return next((line[name] for name in names for line in reversed(kept) if name in line), None)

    # A run that logs nothing has only its mean, which is that of the steps since it was resumed.
    loss = last("loss") if resumed else last("loss", "train_loss")
    return RunSummary(
        run=str(run),
        steps=steps,
        tokens=count_tokens_seen(lines),
        train_loss=float("nan") if loss is None else loss,
        eval_loss=last("eval_loss"),
        train_reward=last("reward"),
        eval_reward=last("eval_reward"),
        seconds=round(seconds, 1),
        best_step=best if best != steps else None,
        warnings=tuple(_list_warnings(lines)),
    )


def _find_best_step(trainer: Trainer) -> int | None:
    """Return the step whose weights the trainer has loaded again at the end, or None where it kept the last ones."""
    state = trainer.state
    is_loaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return int(state.best_global_step) if is_loaded and state.best_global_step is not None else None


def _list_warnings(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what a finished run must not be taken for."""
    equal = [line[_EQUAL_REWARDS] for line in lines if _EQUAL_REWARDS in line]
    if equal and min(equal) == 1.0:
        yield (
            f"all answers to a prompt got the same reward at each of {len(equal)} logged steps, so nothing was learnt from the rewards; look "
            "at completions.jsonl, and choose rules that tell these answers apart, a higher trainer.temperature or other prompts"
        )
