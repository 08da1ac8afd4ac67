"""Summarise a finished run from what its trainer logged."""

from pathlib import Path

from transformers import Trainer

from finetune.runs.summary import RunSummary


def summarise_run(trainer: Trainer, run: Path, steps: int, seconds: float) -> RunSummary:
    """Return what a run has come to, after a last evaluation if there was none at its end."""
    # The trainer's own history is the same in every process; the file belongs to the first one.
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
