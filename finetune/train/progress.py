"""What a run shows and writes while it goes on: a progress bar, `metrics.jsonl`, `loss.png`."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import TrainingError

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
PREFLIGHT = "preflight"  # the prefix of an evaluation that only tries whether it fits


class ProgressBar(TrainerCallback):
    """One bar on standard error, with the newest losses; standard output stays free for results."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar at the step that the run goes on from."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Advance by what has been done since."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the newest losses beside the bar."""
        if self._bar is not None and logs:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
            if shown:
                self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class MetricsWriter(TrainerCallback):
    """Append every logged step to `metrics.jsonl`, and stop the run when the loss is no number any more."""

    def __init__(self, run: Path) -> None:
        self._file = run / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Drop what a stopped run had logged beyond the checkpoint that this one goes on from."""
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self._file.parent) if line["step"] <= state.global_step]
            self._file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line.

        Raises:
            TrainingError: the training loss is NaN or infinite.
        """
        line = logs or {}
        if "train_loss" in line or any(name.startswith(PREFLIGHT) for name in line):
            return
        if state.is_world_process_zero:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **line}) + "\n")
        if not math.isfinite(line.get("loss", 0.0)):
            raise TrainingError(
                f"step {state.global_step}: the training loss is {line['loss']}; lower trainer.learning_rate, "
                "or set model.dtype: bfloat16 (float32 on a CPU) if it was float16; "
                "the last checkpoint of the run directory is from before"
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the logged lines of a run, oldest first."""
    file = run / METRICS_FILE
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# What is drawn below the loss, where a method logs it: a title in plain words, and the names of its curves.
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "reward of the answers, against the start",
        {"rewards/chosen": "chosen, training rows", "rewards/rejected": "rejected, training rows"},
    ),
    (
        "how much more the chosen answers are rewarded",
        {
            "rewards/margins": "training rows",
            "eval_rewards/margins": "held-out rows",
            "margin": "training rows",
            "eval_margin": "held-out rows",
        },
    ),
    (
        "share of pairs in the right order",
        {
            "rewards/accuracies": "training rows",
            "eval_rewards/accuracies": "held-out rows",
            "accuracy": "training rows",
            "eval_accuracy": "held-out rows",
        },
    ),
    (
        "reward of the model's own answers",
        {"reward": "training prompts", "eval_reward": "held-out prompts"},
    ),
    (
        "how far it has moved from the start (KL, nats per token)",
        {"kl": "training prompts", "eval_kl": "held-out prompts"},
    ),
    (
        "tokens of an answer",
        {"completions/mean_length": "training prompts", "eval_completions/mean_length": "held-out prompts"},
    ),
    ("how far from the start (KL, nats)", {"kl": "training rows", "eval_kl": "held-out rows"}),
)
_PREFERENCE_MARKS = ("rewards/margins", "margin", "reward")


def draw_losses(run: Path, title: str) -> None:
    """Draw `loss.png` from `metrics.jsonl`: loss against step, on trained and on held-out rows, and what preferences log."""
    lines = read_metrics(run)
    panels = [panel for panel in _PANELS if any(name in line for line in lines for name in panel[1])]
    figure = Figure(figsize=(7, 4 + 2.2 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(1 + len(panels), squeeze=False, height_ratios=[1.6] + [1] * len(panels))[:, 0]
    compares = any(name in line for line in lines for name in _PREFERENCE_MARKS)
    _draw_curves(axes[0], lines, {"loss": "training rows", "eval_loss": "held-out rows"})
    axes[0].set(ylabel="loss" if compares else "loss (nats per trained token)", title=title)
    if not any(line.get("loss", 0.0) < 0 for line in lines):
        axes[0].set_ylim(bottom=0)
    for panel, (text, curves) in zip(axes[1:], panels, strict=True):
        _draw_curves(panel, lines, curves)
        panel.set_title(text, fontsize="medium")
    axes[-1].set_xlabel("step")
    figure.savefig(run / PLOT_FILE)


def _draw_curves(axes: Any, lines: list[dict[str, Any]], curves: dict[str, str]) -> None:
    for name, label in curves.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            style = "o-" if name.startswith("eval_") else "-"
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
