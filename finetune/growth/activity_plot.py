"""Draw what the checkpoints did with a few texts: their layers, and their loss by position and by source."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.files.pictures.labels import write_label
from finetune.growth.growth_report import CheckpointEntry, Growth

# Figures of a layer, and the titles of their panels.
_LAYER_PANELS = (
    ("activation_rms", "activations after each layer, root mean square"),
    ("attention_entropy", "attention entropy of each layer, nats"),
)


def draw_activity(growth: Growth) -> Figure:
    """Draw a line for each checkpoint that has read the texts, dark for the last one."""
    entries = [entry for entry in growth.checkpoints if entry.activity is not None]
    figure = Figure(figsize=(11.5, 7.4), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for panel, (key, title) in zip(panels, _LAYER_PANELS, strict=False):
        curves = [[layer[key] for layer in _read(entry)["layers"]] for entry in entries]
        _draw(panel, entries, [range(1, len(curve) + 1) for curve in curves], curves)
        panel.set(title=title, xlabel="layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
    _draw_positions(panels[2], entries)
    _draw_sources(panels[3], entries)
    panels[0].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(10)
    figure.suptitle("What the checkpoints do with the texts of --rows")
    return figure


def _read(entry: CheckpointEntry) -> Any:
    assert entry.activity is not None
    return entry.activity


def _draw(panel: Axes, entries: Sequence[CheckpointEntry], places: Sequence[Any], curves: Sequence[Any]) -> None:
    for number, (entry, place, curve) in enumerate(zip(entries, places, curves, strict=True)):
        panel.plot(place, curve, "o-", markersize=3, label=write_label(entry.name), color=shade(number, len(entries)))


def shade(number: int, count: int) -> tuple[float, float, float]:
    """Return a colour from light to dark blue."""
    share = (number + 1) / count
    return (0.75 - 0.63 * share, 0.85 - 0.5 * share, 0.9 - 0.4 * share)


def _draw_positions(panel: Axes, entries: Sequence[CheckpointEntry]) -> None:
    found = [_read(entry)["positions"] for entry in entries]
    places = [[int(first) for first in one] for one in found]
    _draw(panel, entries, places, [[value["loss"] for value in one.values()] for one in found])
    panel.set_xscale("log", base=2)
    panel.set(title="loss by position, nats per token", xlabel="position in the text, from")


def _draw_sources(panel: Axes, entries: Sequence[CheckpointEntry]) -> None:
    names = list(dict.fromkeys(name for entry in entries for name in _read(entry)["sources"]))
    width = 0.8 / len(entries)
    for number, entry in enumerate(entries):
        sources = _read(entry)["sources"]
        places = [place + (number + 0.5) * width - 0.4 for place in range(len(names))]
        panel.bar(places, [sources[name]["loss"] for name in names], width, color=shade(number, len(entries)))
    panel.set_xticks(range(len(names)), [write_label(name) for name in names])
    panel.set(title="loss by source, nats per token")
