"""The table of panels: which metrics of a run are drawn together, on the page of a run and in `loss.png`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.runs.run_files import TASK_SCORES

LOSS = "loss (nats per trained token)"


@dataclass(frozen=True)
class Panel:
    """One panel; `curves` maps each metric to the label of its curve. `in_plot`: whether `loss.png` has it below the loss."""

    title: str
    curves: Mapping[str, str]
    in_plot: bool = False


PANELS: tuple[Panel, ...] = (
    Panel(LOSS, {"loss": "training rows", "eval_loss": "held-out rows"}),
    Panel(
        "implicit reward of the answers in the rows",
        {"rewards/chosen": "chosen, training rows", "rewards/rejected": "rejected, training rows"},
        in_plot=True,
    ),
    Panel(
        "log-likelihood of the answers in the rows, nats",
        {"logps/chosen": "chosen, training rows", "logps/rejected": "rejected, training rows"},
    ),
    Panel(
        "reward of the chosen answer minus that of the rejected one",
        {
            "rewards/margins": "training rows",
            "eval_rewards/margins": "held-out rows",
            "margin": "training rows",
            "eval_margin": "held-out rows",
        },
        in_plot=True,
    ),
    Panel(
        "share of pairs whose chosen answer has the higher reward",
        {
            "rewards/accuracies": "training rows",
            "eval_rewards/accuracies": "held-out rows",
            "accuracy": "training rows",
            "eval_accuracy": "held-out rows",
        },
        in_plot=True,
    ),
    Panel(
        "reward of the model's own answers",
        {"reward": "training prompts", "eval_reward": "held-out prompts"},
        in_plot=True,
    ),
    Panel(
        "tokens of an answer",
        {"completions/mean_length": "training prompts", "eval_completions/mean_length": "held-out prompts"},
        in_plot=True,
    ),
    Panel(
        "KL divergence from the reference model, nats",
        {"kl": "training rows", "eval_kl": "held-out rows"},
        in_plot=True,
    ),
    Panel(
        "share of trained tokens that are the likeliest",
        {"mean_token_accuracy": "training rows", "eval_mean_token_accuracy": "held-out rows"},
    ),
    Panel("learning rate", {"learning_rate": "learning rate"}),
    Panel("gradient norm, before it is clipped", {"grad_norm": "gradient norm"}),
)


def list_panels(lines: Iterable[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """Return the panels of a run: those of the table, and one for each score of a task that was evaluated during the training."""
    prefix = f"eval_{TASK_SCORES}"
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    shown = [(name, *name.removeprefix(prefix).split("/", 1)) for name in names]
    return (*PANELS, *(Panel(f"task {task}: {score}", {name: score}, in_plot=True) for name, task, score in shown))
