"""Draw the weights of each layer, a line for each checkpoint."""

from collections.abc import Callable
from itertools import product

from matplotlib.figure import Figure

from finetune.files.pictures.labels import write_label
from finetune.growth.activity_plot import shade
from finetune.growth.growth_report import CheckpointEntry, Growth
from finetune.growth.weights.weight_statistics import KINDS, TensorStatistics

_FIGURES: tuple[tuple[str, Callable[[TensorStatistics], float | None]], ...] = (
    ("largest singular value", lambda one: one.largest),
    ("stable rank", lambda one: one.stable_rank),
    ("factor on the stored weights", lambda one: None if one.alpha is None else one.scale),
)
_DRAWN = tuple(kind.name for kind in KINDS if kind.is_decomposed)


def draw_layers(growth: Growth) -> Figure:
    """Draw figures of q, k, v and o over the layers, dark for the last checkpoint."""
    entries = [entry for entry in growth.checkpoints if entry.weights]
    figures = [one for one in _FIGURES if any(one[1](found.statistics) is not None for found in entries[0].weights)]
    figure = Figure(figsize=(3.4 * len(_DRAWN), 2.7 * len(figures) + 0.6), layout="constrained")
    panels = figure.subplots(len(figures), len(_DRAWN), squeeze=False)
    for (row, (title, read)), (column, kind) in product(enumerate(figures), enumerate(_DRAWN)):
        panel = panels[row, column]
        for number, entry in enumerate(entries):
            points = _list_points(entry, kind, read)
            style = {"color": shade(number, len(entries)), "label": write_label(entry.name)}
            panel.plot(*zip(*points, strict=True) if points else ([], []), "o-", markersize=2.5, **style)
        panel.set_title(f"{kind}: {title}", fontsize=9)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].legend(frameon=False, fontsize=7)
    figure.supxlabel("layer", fontsize=9)
    figure.suptitle("Attention matrices of each layer")
    return figure


def _list_points(
    entry: CheckpointEntry, kind: str, read: Callable[[TensorStatistics], float | None]
) -> list[tuple[int, float]]:
    """Return layers, counted from 1, with a figure of their matrix of a kind."""
    found = ((one.statistics.layer, read(one.statistics)) for one in entry.weights if one.statistics.kind == kind)
    return [(layer + 1, value) for layer, value in found if layer is not None and value is not None]
