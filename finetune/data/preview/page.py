"""Write the preview as one HTML page that needs no network and no other file."""

import base64
import hashlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.data.account import DataReport
from finetune.data.dataset import Splits
from finetune.data.preview.preview import list_sides
from finetune.errors import OutputError, Place
from finetune.files.safety.disk_errors import translate_os_errors

_STYLE_FOLDER = Path(__file__).parent
_GENERATOR = "finetune preview"
_HEAD_BYTES = 1000
# Shows the token under the pointer, or the one that was touched. It reads and writes text only, never mark-up.
_SCRIPT = """
const bar = document.getElementById("token");
let last = null;
function show(event) {
  const token = event.target.closest(".text [title]");
  if (!token || token === last) return;
  if (last) last.classList.remove("chosen");
  (last = token).classList.add("chosen");
  const ids = token.title.split(" ");
  bar.hidden = false;
  bar.textContent = (ids.length > 1 ? "tokens " : "token ") + ids.join(" ") + "  " + JSON.stringify(token.textContent) +
    (token.closest("mark") ? "  trained" : "  only read");
}
for (const kind of ["pointerover", "click"]) document.addEventListener(kind, show);
"""


@dataclass(frozen=True)
class PagePiece:
    """One token as text, or the tokens that together make up one character."""

    text: str
    token_ids: tuple[int, ...]
    is_trained: bool


@dataclass(frozen=True)
class PageColumn:
    """One text of a row: the whole row, or the chosen or the rejected side of a preference row."""

    title: str
    pieces: tuple[PagePiece, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def trained_tokens(self) -> int:
        """The number of trained tokens."""
        return sum(len(piece.token_ids) for piece in self.pieces if piece.is_trained)


@dataclass(frozen=True)
class PageRow:
    """One row: its place as text, and one column, or two side by side."""

    origin: str
    columns: tuple[PageColumn, ...]


@dataclass(frozen=True)
class PageSource:
    """A file, the format of its rows, and how many of them are for training and held out."""

    name: str
    format: str
    trained: int
    held_out: int


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    title: str
    rows: tuple[PageRow, ...]
    sources: tuple[PageSource, ...]
    report: DataReport


def collect_page(splits: Splits, tokenizer: PreTrainedTokenizerBase, count: int, title: str) -> Page:
    """Return a page of the first `count` rows for training, and the numbers of all rows."""
    sources = list(_count_sources(splits))
    names = _shorten_names([source.name for source in sources])
    rows = []
    for row in splits.train.select(range(min(count, len(splits.train)))):
        place = Place(**row["place"])
        rows.append(PageRow(str(replace(place, file=names[place.file])), _read_columns(row, tokenizer)))
    sources = [replace(source, name=names[source.name]) for source in sources]
    return Page(title, tuple(rows), tuple(sources), splits.report)


def _read_columns(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[PageColumn, ...]:
    """Return the text of a row, or the texts of both sides of a preference row."""
    return tuple(
        PageColumn(side, tuple(split_tokens(tokenizer, token_ids, [bool(mark) for mark in trained])))
        for side, token_ids, trained in list_sides(row)
    )


def _shorten_names(names: Sequence[str]) -> dict[str, str]:
    """Map names to names without folders where those are unique: the page may be sent to others."""
    short = {name: Path(name).name for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def split_tokens(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[PagePiece]:
    """Yield the text of each token, so that the joined texts are the text of all tokens.

    Each token is decoded after the one before it, because some tokenizers drop a space at the beginning of a text. Tokens that
    hold parts of one character become one piece.
    """
    before, start = 0, 0
    for end in range(1, len(token_ids) + 1):
        text = str(tokenizer.decode(token_ids[before:end]))
        if text.endswith("\ufffd") and end < len(token_ids):
            continue
        known = str(tokenizer.decode(token_ids[before:start])) if start > before else ""
        yield PagePiece(text.removeprefix(known), tuple(token_ids[start:end]), any(trained[start:end]))
        before, start = start, end


def _count_sources(splits: Splits) -> Iterator[PageSource]:
    trained, held_out = _count_files(splits.train), _count_files(splits.evaluation)
    formats = splits.report.formats
    for name in dict.fromkeys([*formats, *trained, *held_out]):
        yield PageSource(name, formats.get(name, ""), trained[name], held_out[name])


def _count_files(rows: Dataset | None) -> Counter[str]:
    return Counter() if rows is None else Counter(place["file"] for place in rows["place"])


def make_environment(folder: Path) -> jinja2.Environment:
    """Return where the page templates of a folder are rendered: every text is escaped, and all pages share `page.css`."""
    loader = jinja2.FileSystemLoader([folder, _STYLE_FOLDER])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def render_page(page: Page) -> str:
    """Return the page as HTML. All text in it is escaped, and only its own script can run."""
    environment = make_environment(_STYLE_FOLDER)
    environment.filters["groupby_order"] = _group_pieces
    report = page.report
    splits = [("training", report.train), ("held out", report.evaluation)]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        page=page,
        report=report,
        figures=list(_list_figures(report)),
        histograms=[(name, _scale(split.histogram)) for name, split in splits if split is not None],
        generator=_GENERATOR,
        script=_SCRIPT,
        script_hash=f"sha256-{digest}",
    )


def _group_pieces(pieces: Iterable[PagePiece]) -> list[tuple[bool, list[PagePiece]]]:
    return [(mark, list(group)) for mark, group in itertools.groupby(pieces, key=lambda piece: piece.is_trained)]


def _list_figures(report: DataReport) -> Iterator[tuple[str, str]]:
    splits = [split for split in (report.train, report.evaluation) if split is not None]
    share = report.train.trained_tokens / max(1, report.train.tokens)
    yield "rows read", f"{sum(split.rows_read for split in splits):,}"
    yield "rows for training", f"{report.train.rows:,}"
    yield "rows held out", f"{report.evaluation.rows if report.evaluation else 0:,}"
    yield "dropped", f"{sum(split.dropped for split in splits):,}"
    yield "cut", f"{sum(split.truncated for split in splits):,}"
    yield "tokens for training", f"{report.train.tokens:,}"
    yield "of them trained", f"{report.train.trained_tokens:,} ({share:.0%})"
    yield "median / longest row", f"{report.train.median:,} / {report.train.longest:,}"


def _scale(histogram: Sequence[tuple[int, int]]) -> list[tuple[int, int, str]]:
    most = max((rows for _, rows in histogram), default=1)
    return [(upper, rows, f"{100 * rows / most:.1f}") for upper, rows in histogram]


def write_page(file: Path, text: str) -> None:
    """Write a page whole or not at all. An older page of ours at this path is replaced; anything else is kept.

    Raises:
        OutputError: something else is at this path, or it cannot be written.
    """
    if file.is_dir() or (file.exists() and not _is_page(file)):
        raise OutputError(f"{file}: exists and was not written by `{_GENERATOR}`; choose another name, or remove it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
    except OSError as error:
        raise OutputError(f"{file}: cannot be made: {error.strerror} (at {error.filename}); choose another") from error
    try:
        with translate_os_errors(file):
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace", newline="\n") as stream:
                stream.write(text)
            Path(partial).chmod(0o644)
            Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _is_page(file: Path) -> bool:
    with translate_os_errors(file), file.open("rb") as stream:
        return f'content="{_GENERATOR}"'.encode() in stream.read(_HEAD_BYTES)
