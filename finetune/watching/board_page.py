"""Write runs as one HTML page that needs no network and no other file."""

import base64
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jinja2

from finetune.errors import FinetuneError
from finetune.files.folders import write_new_file
from finetune.files.json_files import write_text
from finetune.files.terminal import escape_json
from finetune.runs.run_files import REPORT_FILE
from finetune.watching.run_view import Board, check_named, read_board

logger = logging.getLogger(__name__)

_TEMPLATE, _SCRIPT = (Path(__file__).with_name(name) for name in ("board.html.jinja", "board.js"))


def render_board(board: Board, *, seconds: float | None = None) -> str:
    """Return the page. With `seconds` it is live: it asks the server that sent it for the newest state so often.

    All texts of runs stand in a block of JSON that the page's own script reads, and only that script can run.
    """
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(run.name for run in board.runs) or "A run that has not begun",
        data=write_board(board).replace("<", "\\u003c"),  # so that no text can close the block
        script=script,
        script_hash=f"sha256-{digest}",
        live=seconds,
    )


def write_board(board: Board) -> str:
    """Return the runs as JSON."""
    return escape_json(json.dumps(board.to_json(), ensure_ascii=False, allow_nan=False))


def write_board_page(folders: Sequence[Path], file: Path) -> Board:
    """Write the page of some runs to a new file, and return what it shows.

    Raises:
        FinetuneError: a path leads nowhere, none is a run directory, or the file exists or cannot be written.
    """
    check_named(folders)
    board = read_board(folders)
    write_new_file(file, render_board(board))
    return board


def write_report(run: Path) -> None:
    """Write `report.html` into a run directory; a full disk or a damaged file is told and does not end the run."""
    try:
        write_text(run / REPORT_FILE, render_board(read_board([run])))
    except (OSError, FinetuneError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("%s: was not written: %s", run / REPORT_FILE, reason)
