"""Draw a sweep: the result of each setting with its spread over the seeds, and the curves over the steps."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.files.pictures.labels import render_png, use_fonts, write_label
from finetune.pipeline.sweeping.sweep_report import PICTURE_FILE, Outcome, SettingResult, SweepReport

_COLOURS = ("#1f6f8b", "#c8553d", "#5b8c5a", "#8a6fae", "#b8862b", "#55606b", "#d27f9b", "#3f9b9b")
# Values that span more than this are drawn on a logarithmic axis.
_LOG_RATIO = 4
_MOST_CURVES = 12


@use_fonts()
def draw_sweep(report: SweepReport, folder: Path) -> None:
    """Write the picture, where a run has finished."""
    settings = [one for one in report.list_settings() if one.final is not None]
    if not settings:
        return
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    results, curves = figure.subplots(1, 2)
    _draw_results(results, report, settings)
    _draw_curves(curves, report, settings)
    figure.suptitle(write_label(Path(report.recipe).stem), fontsize="medium")
    (folder / PICTURE_FILE).write_bytes(render_png(figure))


def _draw_results(axes: Axes, report: SweepReport, settings: Sequence[SettingResult]) -> None:
    places, key = _find_places(settings)
    for number, (one, place) in enumerate(zip(settings, places, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        values = [run.final for run in report.outcomes if run.setting == one.setting and run.final is not None]
        axes.plot([place] * len(values), values, "o", color=colour, alpha=0.45, markersize=4)
        assert one.final is not None
        axes.errorbar(
            [place], [one.final.mean], yerr=[one.final.spread or 0.0], fmt="D", color=colour, capsize=4, markersize=6
        )
    if key is None:
        axes.set_xticks(places, [write_label(one.setting.replace(", ", "\n")) for one in settings])
        axes.tick_params(axis="x", labelsize="small", rotation=30 if len(settings) > 4 else 0)
        axes.margins(x=0.15)
    else:
        axes.set_xlabel(write_label(key))
        if min(places) > 0 and max(places) / min(places) >= _LOG_RATIO:
            axes.set_xscale("log")
        axes.set_xticks(places, [write_label(one.values[key]) for one in settings])
        axes.set_xticks([], minor=True)
    axes.set(ylabel=report.measure, title="at the end of each run: seeds, mean and standard deviation")
    _finish(axes)


def _find_places(settings: Sequence[SettingResult]) -> tuple[list[float], str | None]:
    """Return the places of settings on the axis, and the key that it stands for: the only one, where all its values are numbers."""
    keys = list(settings[0].values)
    if len(keys) == 1:
        try:
            numbers = [float(one.values[keys[0]]) for one in settings]
        except ValueError:
            numbers = []
        if numbers and all(map(math.isfinite, numbers)):
            return numbers, keys[0]
    return [float(number) for number in range(len(settings))], None


def _draw_curves(axes: Axes, report: SweepReport, settings: Sequence[SettingResult]) -> None:
    for number, one in enumerate(settings[:_MOST_CURVES]):
        runs = [run for run in report.outcomes if run.setting == one.setting and run.curve]
        steps, values = _gather(runs)
        if not steps:
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(steps, values.mean(0), "-o", color=colour, markersize=3, label=write_label(one.setting))
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    title = "over the steps: mean, and from the lowest to the highest seed"
    if len(settings) > _MOST_CURVES:
        title += f"; the first {_MOST_CURVES} settings"
    axes.set(xlabel="step", ylabel=report.measure, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    _finish(axes)


def _gather(runs: Sequence[Outcome]) -> tuple[list[int], numpy.ndarray]:
    """Return the steps at which all runs were evaluated, and their values (runs, steps)."""
    tables = [dict(run.curve) for run in runs]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return steps, numpy.array([[table[step] for step in steps] for table in tables])


def _finish(axes: Axes) -> None:
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
