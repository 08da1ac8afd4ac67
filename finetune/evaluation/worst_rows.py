"""Name the rows that a model does worst on, with their texts, so that bad data shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.preview.preview import PreviewRow, colour_text, mark_sides
from finetune.files.terminal import escape_controls


@dataclass(frozen=True)
class WorstRow:
    """A row: `origin` is its place as text, `value` its loss or its margin, and `sides` its texts with the trained parts marked."""

    origin: str
    value: float
    sides: list[PreviewRow]


def list_worst(
    rows: Dataset, values: Sequence[float], badness: Sequence[float], count: int, tokenizer: PreTrainedTokenizerBase
) -> list[WorstRow]:
    """Return the rows of the highest badness, the worst first; all sequences have one entry a row."""
    worst = sorted(range(len(values)), key=lambda number: -badness[number])[:count]
    return [
        WorstRow(rows[number]["origin"], values[number], list(mark_sides(rows[number], tokenizer))) for number in worst
    ]


def describe_worst(rows: Sequence[WorstRow], name: str, *, in_colour: bool) -> str:
    """Return the rows for a terminal, each behind an empty line. Trained text is green or, without colour, in ⟦ ⟧; `name` says what the value is."""
    return "".join(
        f"\n\n── {escape_controls(row.origin)}: {name} {row.value:.4g}"
        + "".join(
            f"\n{f'({side.side}) ' if side.side else ''}{colour_text(side.pieces, in_colour=in_colour)}"
            for side in row.sides
        )
        for row in rows
    )
