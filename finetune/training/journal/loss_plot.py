"""Draw `loss.png`: the curves of a run from its `metrics.jsonl`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.files.pictures.labels import use_fonts, write_label
from finetune.runs.run_files import LOSS_PLOT_FILE, read_metrics
from finetune.watching.panels import list_panels, title_loss

logger = logging.getLogger(__name__)


@use_fonts()
def draw_losses(run: Path, title: str) -> None:
    """Draw `loss.png` from `metrics.jsonl`: the loss on training and held-out rows by step, and the method's other metrics."""
    lines = read_metrics(run)
    names = dict.fromkeys(name for line in lines for name in line)
    panels = [panel for panel in list_panels(names) if panel.in_plot and any(name in names for name in panel.curves)]
    figure = Figure(figsize=(7, 4 + 2.2 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(1 + len(panels), squeeze=False, height_ratios=[1.6] + [1] * len(panels))[:, 0]
    _draw_curves(axes[0], lines, {"loss": "training rows", "eval_loss": "held-out rows"})
    axes[0].set(ylabel=title_loss(names), title=write_label(title))
    if not any(line.get("loss", 0.0) < 0 for line in lines):
        axes[0].set_ylim(bottom=0)
    for axis, panel in zip(axes[1:], panels, strict=True):
        _draw_curves(axis, lines, panel.curves)
        axis.set_title(write_label(panel.title), fontsize="medium")
    axes[-1].set_xlabel("step")
    try:
        figure.savefig(run / LOSS_PLOT_FILE)
    except OSError as error:  # a full disk must not cost the record of a run whose weights are written
        (run / LOSS_PLOT_FILE).unlink(missing_ok=True)
        logger.warning("%s: was not drawn: %s", run / LOSS_PLOT_FILE, error.strerror)


def _draw_curves(axes: Any, lines: list[dict[str, Any]], curves: Mapping[str, str]) -> None:
    for name, label in curves.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            style = "o-" if name.startswith("eval_") else "-"
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
