"""Serve the page of runs to this machine alone, read-only, under an address that nobody can guess."""

import contextlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from finetune.errors import FinetuneError, MachineError
from finetune.runs.run_files import RECORD_FILE
from finetune.watching.board_page import render_board, write_board
from finetune.watching.run_view import Board, check_named, read_board

_HOST = "127.0.0.1"
_SECONDS = 2.0


class BoardServer(ThreadingHTTPServer):
    """Answers two addresses below its token: the page, and the newest state of the runs as JSON."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0, *, waits: bool = False) -> None:
        """Bind the port; 0 takes any free one. With `waits`, runs that have not begun appear when they do.

        Raises:
            FinetuneError: a path leads nowhere, none is a run directory, or the port is taken.
        """
        if not waits:
            check_named(folders)
        self._folders, self._waits = folders, waits
        self._asked, self._ends, self._caught_up = -math.inf, False, threading.Event()
        self.left_out = self.read().left_out
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__((_HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise MachineError(f"--port {port}: cannot be used ({error}); name another one, or 0 for any") from error

    def read(self) -> Board:
        """Read the runs, and those that have begun since.

        Raises:
            FinetuneError: none of the folders is a run directory.
        """
        begun = [folder for folder in self._folders if not self._waits or (folder / RECORD_FILE).is_file()]
        return read_board(begun)

    @contextlib.contextmanager
    def serve_page(self) -> Iterator[None]:
        """Note within the block that an open page asks for the newest state."""
        self._asked, is_last = time.monotonic(), self._ends
        yield
        if is_last:
            self._caught_up.set()

    def let_page_catch_up(self, seconds: float = 10) -> None:
        """Wait until a page that has asked in the last seconds has asked once more, so that it shows how the runs ended."""
        self._ends = True
        if time.monotonic() - self._asked < seconds:
            self._caught_up.wait(seconds)

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{_HOST}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: BoardServer

    def do_GET(self) -> None:
        """Answer one request."""
        pages: dict[str, tuple[str, Callable[[], str]]] = {
            f"/{self.server.token}/": ("text/html; charset=utf-8", self._render_page),
            f"/{self.server.token}/data": ("application/json; charset=utf-8", self._write_data),
        }
        # A page of the web whose name leads to this machine must not read the runs.
        if self.headers.get("Host") != f"{_HOST}:{self.server.server_port}" or self.path not in pages:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with self.server.serve_page():
            self._send(*pages[self.path])

    def _send(self, kind: str, make: Callable[[], str]) -> None:
        try:
            content = make().encode("utf-8", errors="replace")
        except (FinetuneError, OSError) as error:  # such as a run that was removed
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _render_page(self) -> str:
        return render_board(self.server.read(), seconds=_SECONDS)

    def _write_data(self) -> str:
        return write_board(self.server.read())

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the terminal belongs to the training."""
