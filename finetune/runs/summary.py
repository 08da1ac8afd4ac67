"""The summary of a finished run."""

from dataclasses import dataclass

from finetune.errors import describe_count


@dataclass(frozen=True)
class RunSummary:
    """What a finished run reports; losses are nats per trained token, `tokens` counts all tokens that were seen.

    Online methods also report the weighted sum of rewards, on the last logged batch and on held-out prompts. `best_step` is the step
    whose weights were kept, and that the losses belong to, where it is not the last one. `warnings` are for a person.
    """

    run: str
    steps: int
    tokens: int
    train_loss: float
    eval_loss: float | None
    seconds: float
    train_reward: float | None = None
    eval_reward: float | None = None
    best_step: int | None = None
    warnings: tuple[str, ...] = ()


def describe_run(summary: RunSummary) -> str:
    """Return the summary as one line for a person."""
    facts = [describe_count(summary.steps, "step"), f"training loss {summary.train_loss:.3f}"]
    if summary.eval_loss is not None:
        facts.append(f"held-out loss {summary.eval_loss:.3f}")
    for name, reward in (("reward", summary.train_reward), ("held-out reward", summary.eval_reward)):
        if reward is not None:
            facts.append(f"{name} {reward:.3f}")
    if summary.best_step is not None:
        facts.append(f"weights and losses of step {summary.best_step}, the best one")
    lines = [f"{summary.run}: {', '.join(facts)}, {summary.seconds:.0f} s"]
    return "\n".join([*lines, *(f"warning: {text}" for text in summary.warnings)])
