"""Show rows as the model sees them: their text with the trained parts marked, and the numbers of all rows."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.account import SplitReport
from finetune.data.dataset import Splits
from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.errors import describe_count
from finetune.files.terminal import COLOUR, PLAIN_TEXT, escape_controls

_OPEN, _CLOSE = "⟦", "⟧"
_BAR_WIDTH = 40


@dataclass(frozen=True)
class PreviewRow:
    """One row, or one side of a pair.

    `origin` is its place as text. `trained` holds 1 for each trained token, else 0, shape `(tokens,)`. `pieces` is the text in
    runs that are trained or not. `side` says which side of a pair it is, or which label or reference answer it has.
    """

    origin: str
    text: str
    token_ids: list[int]
    trained: list[int]
    pieces: list[tuple[str, bool]]
    side: str = ""


@dataclass(frozen=True)
class Preview:
    """A few rows, and the numbers of all rows. A notebook shows the rows with the trained text marked."""

    rows: list[PreviewRow]
    counts: dict[str, Any]

    def _repr_html_(self) -> str:
        return "".join(_render_row(row) for row in self.rows)


def _render_row(row: PreviewRow) -> str:
    """Return a row as HTML for a notebook; every text in it is escaped."""
    # Without its folder: a notebook is passed on to others.
    place = f"{Path(row.origin).name} {row.side}".rstrip()
    title = html.escape(f"{place}: {sum(row.trained):,} of {describe_count(len(row.token_ids), 'token')} trained")
    pieces = (f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text) for text, trained in row.pieces)
    return f"<p><b>{title}</b></p><pre style='white-space: pre-wrap'>{''.join(pieces)}</pre>"


def preview_rows(splits: Splits, tokenizer: PreTrainedTokenizerBase, count: int) -> Preview:
    """Return the first `count` rows for training as the model sees them."""
    chosen = splits.train.select(range(min(count, len(splits.train))))
    rows = [side for row in chosen for side in mark_sides(row, tokenizer)]
    return Preview(rows, splits.report.to_json())


def mark_sides(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[PreviewRow]:
    """Yield each text of a prepared row as the model sees it."""
    for side, token_ids, trained in list_sides(row):
        pieces = _join_pieces(tokenizer, token_ids, trained)
        yield PreviewRow(row["origin"], tokenizer.decode(token_ids), token_ids, trained, pieces, side)


def list_sides(row: Mapping[str, Any]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield `(side, token ids, trained)` for each text of a row: one text, or both sides of a pair."""
    if "chosen_ids" in row:
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            yield side, [*prompt, *answer], [0] * len(prompt) + [1] * len(answer)
        return
    if "prompt" in row:
        side = "prompt" if row["answer"] is None else f"prompt; reference answer: {row['answer']!r}"
        yield side, row["input_ids"], [0] * len(row["input_ids"])
        return
    side = "" if "label" not in row else "liked" if row["label"] else "not liked"
    yield side, row["input_ids"], [int(label != IGNORED_LABEL) for label in row["labels"]]


def _join_pieces(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], trained: list[int]
) -> list[tuple[str, bool]]:
    """Decode each run of tokens that are trained or not as a whole, because a character can span several tokens."""
    pieces, start = [], 0
    for end in range(1, len(token_ids) + 1):
        if end == len(token_ids) or trained[end] != trained[start]:
            pieces.append((str(tokenizer.decode(token_ids[start:end])), bool(trained[start])))
            start = end
    return pieces


def describe_preview(preview: Preview, *, in_colour: bool) -> str:
    """Return the preview for a terminal. Trained text is green or, without colour, in ⟦ ⟧."""
    lines = [f"Trained text {'is green' if in_colour else f'stands in {_OPEN} {_CLOSE}'}."]
    if not any(sum(row.trained) for row in preview.rows):
        lines = ["These are prompts: the model writes the answers, and is trained on those."]
    for row in preview.rows:
        side = f" ({row.side})" if row.side else ""
        lines += [
            "",
            f"── {row.origin}{side}: {describe_count(len(row.token_ids), 'token')}, {sum(row.trained)} trained",
            colour_text(row.pieces, in_colour=in_colour),
        ]
    for name in ("train", "evaluation"):
        if preview.counts[name] is not None:
            lines += ["", *_describe_split(name, SplitReport(**preview.counts[name]))]
    notes = preview.counts["notes"]
    lines += ["", *notes] if notes else []
    read_as = ", ".join(f"{path} as {entry}" for path, entry in preview.counts["formats"].items())
    return "\n".join([*lines, "", f"read {read_as}; template {preview.counts['template']}"])


def colour_text(pieces: Sequence[tuple[str, bool]], *, in_colour: bool) -> str:
    """Return a text for a terminal, its trained parts green or, without colour, in ⟦ ⟧."""
    opening, closing = (COLOUR, PLAIN_TEXT) if in_colour else (_OPEN, _CLOSE)
    shown = ((escape_controls(piece), is_trained) for piece, is_trained in pieces)
    return "".join(f"{opening}{piece}{closing}" if is_trained else piece for piece, is_trained in shown)


def _describe_split(name: str, split: SplitReport) -> list[str]:
    most = max((rows for _, rows in split.histogram), default=1)
    bars = [
        f"  up to {upper:>6,} tokens  {'█' * max(1, round(_BAR_WIDTH * rows / most)):<{_BAR_WIDTH}} {rows:,}"
        for upper, rows in split.histogram
    ]
    account = (
        f"{name}: {describe_count(split.rows_read, 'row')} read, {split.rows:,} kept, {split.dropped:,} dropped, {split.truncated:,} truncated "
        f"({describe_count(split.answers_cut, 'answer')} cut); {split.trained_tokens:,} of {describe_count(split.tokens, 'token')} trained; "
        f"median {split.median:,}, longest {split.longest:,}"
    )
    return [account, *bars]
