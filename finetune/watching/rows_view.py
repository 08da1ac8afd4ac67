"""Read what a run keeps of its rows: their texts, their lengths, what was dropped, their sources, and those of the highest loss."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.files.json_files import explain_damage, read_json
from finetune.files.terminal import escape_controls
from finetune.runs.run_files import MEASURED_ROWS_FILE

_MOST_SOURCES = 20


@dataclass(frozen=True)
class ShownText:
    """A text of a row in pieces, each with whether it is trained; `title` says where it stands and how it did."""

    title: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class RowGroup:
    """Texts under a title."""

    title: str
    texts: tuple[ShownText, ...]


@dataclass(frozen=True)
class RowsView:
    """What the page shows of the rows.

    `lengths` holds `(tokens up to, rows)`, `left_out` the number of rows by reason, and `sources` a table with its head.
    """

    groups: tuple[RowGroup, ...]
    lengths: tuple[tuple[int, int], ...]
    left_out: Mapping[str, int]
    sources: tuple[tuple[str, ...], ...]


def read_rows_view(folder: Path, data: Mapping[str, Any]) -> RowsView:
    """Return what the page shows of the rows; `data` is the report of the run's record."""
    measured = read_json(folder / MEASURED_ROWS_FILE) or {}
    train = data.get("train") or {}
    lengths = tuple((upper, rows) for upper, rows in train.get("histogram", ()))
    left_out = {escape_controls(reason): count for reason, count in _count_left_out(data).items()}
    sources = {name: (int(count), int(tokens)) for name, (count, tokens) in (train.get("sources") or {}).items()}
    with explain_damage(folder / MEASURED_ROWS_FILE):
        return RowsView(tuple(_list_groups(measured)), lengths, left_out, tuple(_describe_sources(sources, measured)))


def _list_groups(measured: Mapping[str, Any]) -> Iterator[RowGroup]:
    for ranking in measured.get("rankings", ()):
        if ranking["rows"]:
            texts = [text for one in ranking["rows"] for text in _show_ranked(one, measured["rows"])]
            yield RowGroup(f"{ranking['title']} ({measured['measure']})", tuple(texts))
    if preview := measured.get("preview"):
        texts = [_show(side, _count_tokens(side)) for side in preview]
        yield RowGroup("The first rows as the model sees them", tuple(texts))


def _show_ranked(ranked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[ShownText]:
    row = rows[ranked["number"]]
    values = f"{row['after']:.4g}, before the training {row['before']:.4g}"
    for number, side in enumerate(ranked["sides"]):
        yield _show(side, _count_tokens(side) if number else values)


def _show(side: Mapping[str, Any], remark: str) -> ShownText:
    name = f" ({side['side']})" if side["side"] else ""
    pieces = tuple((escape_controls(text), bool(trained)) for text, trained in side["pieces"])
    return ShownText(escape_controls(f"{side['origin']}{name}: {remark}"), pieces)


def _count_tokens(side: Mapping[str, Any]) -> str:
    return f"{side['trained']:,} of {side['tokens']:,} tokens trained"


def _count_left_out(data: Mapping[str, Any]) -> dict[str, int]:
    """Return how many rows were not trained as they stood in the files, by reason."""
    splits = [split for split in (data.get("train"), data.get("evaluation")) if split]
    found = dict(data.get("left_out") or {})
    found["too long, dropped"] = sum(split["dropped"] - split.get("bad", 0) for split in splits)
    found["faulty, dropped"] = sum(split.get("bad", 0) for split in splits)
    found["too long, cut"] = sum(split["truncated"] for split in splits)
    return {reason: count for reason, count in found.items() if count}


def _describe_sources(sources: Mapping[str, Sequence[int]], measured: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a head and one line for each source: its rows and tokens, its share, and its mean loss by the measured rows."""
    if not sources:
        return
    yield "source", "rows", "tokens", "share of tokens", "mean before", "mean after", "rows measured"
    total = sum(tokens for _, tokens in sources.values()) or 1
    largest = sorted(sources.items(), key=lambda item: -item[1][1])
    for name, (count, tokens) in largest[:_MOST_SOURCES]:
        own = [row for row in measured.get("rows", ()) if row["source"] == name]
        yield (
            escape_controls(name),
            f"{count:,}",
            f"{tokens:,}",
            f"{tokens / total:.1%}",
            *(_average(own, value, weighs_tokens=measured.get("is_mean", False)) for value in ("before", "after")),
            str(len(own)),
        )
    if len(largest) > _MOST_SOURCES:
        yield f"and {len(largest) - _MOST_SOURCES:,} more sources", *[""] * 6


def _average(rows: Iterable[Mapping[str, Any]], value: str, *, weighs_tokens: bool) -> str:
    """Return the mean of the rows' values as text, or nothing where none is known."""
    known = [(row[value], row["trained"] if weighs_tokens else 1) for row in rows if row[value] is not None]
    weight = sum(trained for _, trained in known)
    return f"{sum(one * trained for one, trained in known) / weight:.3f}" if weight else ""
