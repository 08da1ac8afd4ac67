"""Draw checkpoints side by side: their scores, and what is inside them, over the tokens that they have seen."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.evaluation.tasks.task_forms import Figure as ScoreFigure
from finetune.files.pictures.labels import render_png, use_fonts, write_label
from finetune.growth.activity_plot import draw_activity
from finetune.growth.growth_report import CheckpointEntry, Growth, describe_tokens, group_lines
from finetune.growth.layer_plot import draw_layers
from finetune.growth.scores.score_lines import Origin, ScoreLine
from finetune.growth.weights.weight_changes import TensorEntry
from finetune.growth.weights.weight_statistics import KINDS

SCORES_PICTURE, WEIGHTS_PICTURE, LAYERS_PICTURE = "scores.png", "weights.png", "layers.png"
ACTIVITY_PICTURE = "activity.png"
_STYLES: dict[Origin, dict[str, Any]] = {
    "published": {"color": "#8a929c", "marker": "D", "linestyle": ":"},
    "measured": {"color": "#1f6f8b", "marker": "o", "linestyle": "-"},
    "tuned": {"color": "#c8553d", "marker": "s", "linestyle": "--"},
}
_COLUMNS, _MOST_NAMES, _LOG_RATIO = 3, 12, 20
_BARS: dict[str, Any] = {"capsize": 3.0, "markersize": 5.0, "linewidth": 1.6}

_MATRICES = tuple(kind.name for kind in KINDS if not kind.name.endswith(("norm", "bias")))
_ALL_BUT_BIASES = tuple(kind.name for kind in KINDS if not kind.name.endswith("bias"))

# What is drawn of the weights: a title, the kinds of tensors, and the figure of a tensor that is averaged over the layers.
_PANELS: tuple[tuple[str, Sequence[str], Callable[[TensorEntry], float | None]], ...] = (
    ("root mean square of the weights", _MATRICES, lambda one: one.statistics.rms),
    ("largest singular value", _MATRICES, lambda one: one.statistics.largest),
    ("stable rank", _MATRICES, lambda one: one.statistics.stable_rank),
    ("stored alpha", _ALL_BUT_BIASES, lambda one: one.statistics.alpha),
    (
        "factor on the stored weights",
        _ALL_BUT_BIASES,
        lambda one: None if one.statistics.alpha is None else one.statistics.scale,
    ),
    ("cosine with the checkpoint before", _MATRICES, lambda one: None if one.since is None else one.since.cosine),
)


@use_fonts()
def draw_growth(growth: Growth, folder: Path) -> list[str]:
    """Write the pictures for which there are numbers, and return their names."""
    drawn = []
    if growth.lines:
        _save(_draw_scores(growth), folder / SCORES_PICTURE)
        drawn.append(SCORES_PICTURE)
    if any(entry.weights for entry in growth.checkpoints):
        _save(_draw_weights(growth), folder / WEIGHTS_PICTURE)
        _save(draw_layers(growth), folder / LAYERS_PICTURE)
        drawn += [WEIGHTS_PICTURE, LAYERS_PICTURE]
    if any(entry.activity is not None for entry in growth.checkpoints):
        _save(draw_activity(growth), folder / ACTIVITY_PICTURE)
        drawn.append(ACTIVITY_PICTURE)
    return drawn


def _save(figure: Figure, file: Path) -> None:
    file.write_bytes(render_png(figure))


def find_places(checkpoints: Sequence[CheckpointEntry]) -> tuple[list[float], bool]:
    """Return the places of checkpoints on the axis, and whether they are tokens: else one after the other.

    Tokens are taken where all checkpoints have them and no two share a place.
    """
    tokens = [entry.tokens for entry in checkpoints]
    known = [float(count) for count in tokens if count is not None]
    if len(known) == len(tokens) and len(set(known)) == len(known):
        return known, True
    return [float(number) for number in range(len(tokens))], False


def _make_panels(count: int, growth: Growth, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    places, are_tokens = find_places(growth.checkpoints)
    labels = [
        write_label(entry.name) + (f"\n{describe_tokens(entry.tokens)}" if are_tokens else "")
        for entry in growth.checkpoints
    ]
    every = -(-len(labels) // _MOST_NAMES)
    for panel in axes[:count]:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xticks(places[::every], labels[::every], fontsize=7, rotation=35, ha="right", rotation_mode="anchor")
    figure.suptitle(f"{title}, {'over the tokens seen' if are_tokens else 'in the given order'}")
    return figure, axes[:count]


def _draw_scores(growth: Growth) -> Figure:
    groups = group_lines(growth.lines)
    figure, panels = _make_panels(len(groups), growth, "Scores of the checkpoints, with standard errors")
    places, _ = find_places(growth.checkpoints)
    for panel, group in zip(panels, groups, strict=True):
        for line in group:
            _draw_line(panel, places, line)
        values = [one.value for line in group for one in line.figures if one is not None]
        _choose_scale(panel, values)
        unit = group[-1].unit
        panel.set_title(f"{group[-1].name}{f', {unit}' if unit else ''} (n = {group[-1].rows:,})", fontsize=10)
        panel.legend(frameon=False, fontsize=8)
    return figure


def _choose_scale(panel: Axes, values: Sequence[float]) -> None:
    """Draw powers of ten where values differ much: perplexities of the first checkpoints, tables of tokens beside matrices."""
    if min(values) > 0 and max(values) > _LOG_RATIO * min(values):
        panel.set_yscale("log")


def _draw_line(panel: Axes, places: Sequence[float], line: ScoreLine) -> None:
    points = [(place, one) for place, one in zip(places, line.figures, strict=True) if one is not None]
    panel.errorbar(
        [place for place, _ in points],
        [one.value for _, one in points],
        yerr=[_bound(one) for _, one in points],
        label=line.origin,
        **{**_BARS, **_STYLES[line.origin]},
    )


def _bound(figure: ScoreFigure) -> float:
    """Return the length of an error bar, of at most the value: perplexities of weak models have errors of 1e20 times that."""
    return min(figure.stderr or 0.0, abs(figure.value))


def _draw_weights(growth: Growth) -> Figure:
    drawn = [(title, curves) for title, kinds, read in _PANELS if (curves := _average(growth, kinds, read))]
    figure, panels = _make_panels(len(drawn), growth, "Weights of the checkpoints, means over the layers")
    places, _ = find_places(growth.checkpoints)
    drawn_kinds: dict[str, Artist] = {}
    for panel, (title, curves) in zip(panels, drawn, strict=True):
        _choose_scale(panel, [value for values in curves.values() for value in values if value is not None])
        for kind, values in curves.items():
            points = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            number = _ALL_BUT_BIASES.index(kind)
            style = ("-", "--")[number // 10]
            (drawn_kinds[kind],) = panel.plot(
                *zip(*points, strict=True), style, marker="o", markersize=3.5, color=f"C{number % 10}"
            )
        panel.set_title(title, fontsize=10)
    figure.legend(
        list(drawn_kinds.values()), list(drawn_kinds), loc="outside lower center", ncols=7, frameon=False, fontsize=9
    )
    return figure


def _average(
    growth: Growth, kinds: Sequence[str], read: Callable[[TensorEntry], float | None]
) -> dict[str, list[float | None]]:
    """Return for each kind the mean over its layers, for each checkpoint; kinds without any number are left out."""
    found: dict[str, list[float | None]] = {}
    for kind in kinds:
        means: list[float | None] = []
        for entry in growth.checkpoints:
            read_values = (read(one) for one in entry.weights if one.statistics.kind == kind)
            values = [value for value in read_values if value is not None]
            means.append(sum(values) / len(values) if values else None)
        if any(mean is not None for mean in means):
            found[kind] = means
    return found
