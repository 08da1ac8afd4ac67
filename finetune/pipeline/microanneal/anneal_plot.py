"""Draw a micro-annealing: the change of the held-out loss by source, and the curves of both runs."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.files.pictures.labels import render_png, use_fonts, write_label
from finetune.pipeline.microanneal.anneal_plan import ARMS, NEW, OLD
from finetune.pipeline.microanneal.anneal_results import AnnealLine, AnnealReport
from finetune.runs.run_files import HEAD_NORM, Z_TERM

PICTURE_FILE = "microanneal.png"
_ARM_COLOURS = {OLD: "#55606b", NEW: "#c8553d"}
_VERDICT_COLOURS = {"better": "#3b7d4f", "worse": "#b03a2e", "no real difference": "#8a929c"}
_CURVES = (
    ("loss", "loss on training rows (nats a token)"),
    (HEAD_NORM, "norm of lm_head, as the model uses it"),
    (Z_TERM, "z term of the loss (nats a token)"),
)


@use_fonts()
def draw_anneal(report: AnnealReport, folder: Path) -> None:
    """Write the picture; curves that no run logged are left out."""
    shown = [pair for pair in _CURVES if any(pair[0] in line for lines in report.curves.values() for line in lines)]
    figure = Figure(figsize=(11, 7.2 if len(shown) > 1 else 4), layout="constrained")
    axes = figure.subplots(2 if len(shown) > 1 else 1, 2, squeeze=False).flatten()
    _draw_changes(axes[0], [line for line in report.lines if line.unit == "nats" and not line.is_better_high])
    for axis, (name, title) in zip(axes[1:], shown, strict=False):
        _draw_curves(axis, report, name, title)
    for axis in axes[1 + len(shown) :]:
        axis.set_axis_off()
    (folder / PICTURE_FILE).write_bytes(render_png(figure))


def _draw_changes(axes: Axes, lines: list[AnnealLine]) -> None:
    names = []
    for place, line in enumerate(lines):
        low, high = line.test.low or 0.0, line.test.high or 0.0
        colour = _VERDICT_COLOURS[line.verdict]
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([line.test.change], [place], "D" if line.decides else "o", color=colour, markersize=7)
        names.append(("after fine-tuning: " if line.stage == "tuned" else "") + line.name)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(
        range(len(lines)), [f"{write_label(name)}\n{line.verdict}" for name, line in zip(names, lines, strict=True)]
    )
    axes.tick_params(axis="y", labelsize="small")
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set(title="held-out loss with the candidate, less that without (95 %)", xlabel="nats a token: lower is better")
    _finish(axes)


def _draw_curves(axes: Axes, report: AnnealReport, name: str, title: str) -> None:
    for arm, lines in report.curves.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, "-", color=_ARM_COLOURS[arm], label=ARMS[arm], linewidth=1.6)
    axes.set(title=title, xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
