"""The table of panels: which metrics of a run are drawn together, on the page of a run and in `loss.png`."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from finetune.runs.run_files import TASK_SCORES

_LOSS = "loss (nats per trained token)"
# Where one of these is logged, the loss compares answers, and is no mean over tokens.
_COMPARING = frozenset({"rewards/margins", "margin", "reward"})


@dataclass(frozen=True)
class Panel:
    """One panel; `curves` maps each metric to the label of its curve. `in_plot`: whether `loss.png` has it below the loss.

    `unit`: what the values are divided by for the page.
    """

    title: str
    curves: Mapping[str, str]
    in_plot: bool = False
    unit: float = 1.0


PANELS: tuple[Panel, ...] = (
    Panel(_LOSS, {"loss": "training rows", "eval_loss": "held-out rows"}),
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
    Panel("tokens a second", {"tokens_per_second": "training"}),
    Panel("GPU memory, GB", {"gpu_memory_bytes": "in use", "planned_bytes": "planned peak"}, unit=1e9),
    Panel("GPU temperature, °C", {"gpu_temperature": "GPU"}),
    Panel("GPU power, W", {"gpu_power_watts": "GPU"}),
    Panel("share of time in which the GPU computed", {"gpu_utilisation": "GPU"}),
)
_TASK_SCORES = f"eval_{TASK_SCORES}"
# TRL's names of the mean reward of one rule or judge, such as `rewards/final_answer/mean`.
_RULE_NAME = re.compile(r"(?:eval_)?rewards/([^/]+)/mean")


def title_loss(names: Iterable[str]) -> str:
    """Return the title of the loss of a run that logged these metrics."""
    return _LOSS if _COMPARING.isdisjoint(names) else "loss"


def list_panels(names: Iterable[str]) -> tuple[Panel, ...]:
    """Return the panels of a run that logged these metrics.

    To those of the table come the rewards by rule, and one for each score of a task that was evaluated during the training.
    """
    names = tuple(names)
    return (replace(PANELS[0], title=title_loss(names)), *PANELS[1:], *_list_rules(names), *_list_tasks(names))


def _list_rules(names: Iterable[str]) -> Iterator[Panel]:
    rules = {name: found[1] for name in names if (found := _RULE_NAME.fullmatch(name))}
    if rules:
        curves = {
            name: f"{rule}, held-out prompts" if name.startswith("eval_") else rule for name, rule in rules.items()
        }
        yield Panel("mean reward by rule", curves)


def _list_tasks(names: Iterable[str]) -> Iterator[Panel]:
    for name in names:
        if name.startswith(_TASK_SCORES):
            task, score = name.removeprefix(_TASK_SCORES).split("/", 1)
            yield Panel(f"task {task}: {score}", {name: score}, in_plot=True)
