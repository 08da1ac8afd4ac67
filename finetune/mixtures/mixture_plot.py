"""Draw the published mixtures: the share of each category in each phase."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.errors import OutputError
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.mixtures.categories import CATEGORIES
from finetune.mixtures.published import Mixture, list_mixtures

FORMATS = (".png", ".svg", ".pdf")
_COLOURS: Mapping[str, str] = {
    "web": "#3b6ea5",
    "encyclopedia": "#6aa5d2",
    "books": "#2a8c82",
    "synthetic": "#8cbb6a",
    "code": "#e0a030",
    "mathematics": "#c8553d",
    "chinese": "#8d5a97",
    "instruction": "#555f6b",
}
_INK, _FAINT = "#22272e", "#8a929c"
_LABEL_HEIGHT = 0.052  # the smallest distance of two labels that do not touch, as a share of the axis
_GAP = 0.6  # between the bars of the stable phases and those of the annealing


def draw_mixtures(path: Path) -> None:
    """Draw every published mixture as a stacked bar, and write the picture; an existing file is replaced.

    Raises:
        OutputError: the ending is not one of `FORMATS`, or the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS or path.is_dir():
        raise OutputError(f"{path}: must be a file that ends in {', '.join(FORMATS)}")
    image = io.BytesIO()
    _make_figure(list_mixtures()).savefig(image, format=path.suffix.lower()[1:], dpi=160)
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.getvalue())


def _make_figure(mixtures: Sequence[Mixture]) -> Figure:
    figure = Figure(figsize=(10.4, 5.0), layout="constrained")
    axes = figure.add_subplot()
    # A gap marks the annealing, where the mixture changes suddenly; during the stable phases it changes slowly.
    stable = sum(mixture.phase <= 25 for mixture in mixtures)
    places = [number if number < stable else stable + _GAP + (number - stable) * 1.2 for number in range(len(mixtures))]
    floors = [0.0] * len(mixtures)
    for category in CATEGORIES:
        heights = [mixture.categories[category] for mixture in mixtures]
        axes.bar(places, heights, bottom=floors, width=0.88, color=_COLOURS[category], linewidth=0)
        floors = [floor + height for floor, height in zip(floors, heights, strict=True)]
    names = [
        str(mixture.phase) if mixture.phase <= 25 else f"{mixture.phase}\n{mixture.context}" for mixture in mixtures
    ]
    axes.set_xticks(places, names, fontsize=9)
    _label_ends(axes, mixtures[0].categories, places[0] - 0.75, "right")
    _label_ends(axes, mixtures[-1].categories, places[-1] + 0.75, "left")
    for start, end, text in ((0, stable - 1, "stable phases, 40 B tokens each"), (stable, -1, "annealing")):
        axes.text((places[start] + places[end]) / 2, 1.015, text, ha="center", va="bottom", fontsize=10, color=_INK)
    axes.set(ylim=(0, 1), xlim=(places[0] - 0.5, places[-1] + 0.5))
    axes.set_xlabel("pre-training phase", color=_INK)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    axes.set_title("What YuLan-Mini was trained on", fontsize=13, color=_INK, pad=26)
    figure.supxlabel(
        "share of the tokens in every phase, as published in RUC-GSAI/YuLan-Mini; the grouping is this kit's",
        fontsize=8,
        color=_FAINT,
    )
    return figure


def _label_ends(axes: Axes, shares: Mapping[str, float], place: float, align: str) -> None:
    """Write the name and share of every category beside a bar, at its middle or as near as the other labels allow."""
    floor, heights = 0.0, []
    for category in CATEGORIES:
        heights.append(floor + shares[category] / 2)
        floor += shares[category]
    for (category, share), height in zip(shares.items(), _spread(heights), strict=True):
        text = f"{category} {share:.0%}" if align == "right" else f"{share:.0%} {category}"
        axes.text(place, height, text, ha=align, va="center", fontsize=10, color=_COLOURS[category], fontweight="bold")


def _spread(heights: Sequence[float]) -> list[float]:
    """Move ascending heights apart to at least `_LABEL_HEIGHT`: first upwards, then down from the top."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + _LABEL_HEIGHT) if moved else height)
    ceiling = 1.0
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], ceiling)
        ceiling = moved[place] - _LABEL_HEIGHT
    return moved
