"""A file of keys and texts that survives a kill at any moment: what was paid for once is not paid for again."""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import OutputError

_SECONDS = 60.0


class KeyedStore:
    """Texts by key in a SQLite file; several threads and processes may use it at the same time."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        with self._translate():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(0o600)
            except OSError as error:
                raise OutputError(
                    f"{file}: cannot be made: {error.strerror}; set FINETUNE_CACHE to another folder"
                ) from error
            self._database = sqlite3.connect(file, timeout=_SECONDS, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, text TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """Return the text of a key, or None."""
        with self._lock, self._translate():
            found = self._database.execute("SELECT text FROM texts WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def put(self, key: str, text: str) -> None:
        """Keep a text under its key; it is on the disk when this returns."""
        with self._lock, self._translate():
            self._database.execute("INSERT OR REPLACE INTO texts VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextlib.contextmanager
    def _translate(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OutputError(
                f"{self._file}: cannot be used: {error}; free space on the disk, or remove this file"
            ) from error
