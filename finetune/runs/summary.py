"""What a finished run reports of itself."""

from dataclasses import dataclass
from pathlib import Path

from transformers import Trainer


@dataclass(frozen=True)
class RunSummary:
    """What a finished run reports; losses are nats per trained token, `tokens` counts all that were seen.

    The rewards are those of methods whose answers are judged: the weighted sum, on the newest batch and on held-out prompts.
    """

    run: str
    steps: int
    tokens: int
    train_loss: float
    eval_loss: float | None
    seconds: float
    train_reward: float | None = None
    eval_reward: float | None = None


def describe_run(summary: RunSummary) -> str:
    """Return the summary as one line for a person."""
    facts = [f"{summary.steps} steps", f"training loss {summary.train_loss:.3f}"]
    if summary.eval_loss is not None:
        facts.append(f"held-out loss {summary.eval_loss:.3f}")
    for name, reward in (("reward", summary.train_reward), ("held-out reward", summary.eval_reward)):
        if reward is not None:
            facts.append(f"{name} {reward:.3f}")
    return f"{summary.run}: {', '.join(facts)}, {summary.seconds:.0f} s"


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
