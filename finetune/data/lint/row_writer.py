"""Write rows as they stood in their source, one JSONL file for each source file."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from finetune.data.lint.findings import Split


class RowWriter:
    """Writes rows into a folder, one file for each source file. Files of the same name get a number.

    `counts` maps the names of the files to their rows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[Split, str], IO[str]] = {}
        self.counts: Counter[str] = Counter()

    def write(self, split: Split, source: str, raw: Mapping[str, Any] | None) -> None:
        """Write a row into the file for its source."""
        file = self._files.get((split, source)) or self._open(split, source)
        file.write(_write_row(raw) + "\n")
        self.counts[Path(file.name).name] += 1

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _open(self, split: Split, source: str) -> IO[str]:
        stem = Path(Path(source).name.removesuffix(".gz")).stem
        paths = (
            self._folder / f"{stem}{end}.jsonl" for end in itertools.chain([""], map("-{}".format, itertools.count(2)))
        )
        path = next(path for path in paths if not path.exists())
        # A lone surrogate is written as the JSON escape that it was read from; line ends are the same on every system.
        file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._files[split, source] = file
        return file


def _write_row(raw: Mapping[str, Any] | None) -> str:
    """Return a row as JSON. Numbers that are not finite, which Parquet can hold and JSON cannot, become null."""
    try:
        return json.dumps(raw, ensure_ascii=False, default=write_as_text, allow_nan=False)
    except ValueError:
        text = json.dumps(raw, ensure_ascii=False, default=write_as_text)
        plain = json.loads(text, parse_constant=lambda _: None)
        return json.dumps(plain, ensure_ascii=False)


def write_as_text(value: Any) -> str:
    """Return a value that JSON cannot hold, such as a date from Parquet, as text."""
    return str(value)
