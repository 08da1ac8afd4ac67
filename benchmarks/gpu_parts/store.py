"""The results of earlier calls: what is kept, and what a new call replaces."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts.lines import is_measured, read_lines, write_lines
from gpu_parts.report import PROGRAMS, describe
from gpu_parts.running import Part

# The lists of rows; each is a file of lines while the parts run.
LISTS = ("tests", "plans", "memory", "large", *PROGRAMS, "export")
RESULT, TABLE = "gpu.json", "gpu.md"


def hash_sources(root: Path) -> str:
    """Return a short name of the state of the kit and of the measurement."""
    digest = hashlib.sha256()
    for folder in ("finetune", "benchmarks/gpu_parts", "tests/gpu"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


@dataclass
class Store:
    """The results in a folder: of earlier calls on the same card with the same versions, and of this one as its parts end."""

    output: Path
    lines: Path
    sources: str
    device: Mapping[str, Any]
    results: dict[str, Any] = field(default_factory=dict)

    def begin(self, written: Sequence[str], keep: bool) -> None:
        """Load what there is, and write the rows to the files that the parts add to.

        Of the lists that are written again, rows of another state of the kit are left out, unless they are to be kept, and so are
        the reasons why something was not measured.
        """
        self.results = self._load()
        self.lines.mkdir(parents=True, exist_ok=True)
        states = self.results.setdefault("states", {})
        for name in LISTS:
            rows = self.results.get(name, [])
            if name in written:
                is_same = keep or states.get(name) == self.sources
                rows = [row for row in rows if is_same and is_measured(row)]
            write_lines(self.lines / f"{name}.jsonl", rows)
        states |= dict.fromkeys(written, self.sources)

    def _load(self) -> dict[str, Any]:
        file = self.output / RESULT
        if not file.is_file():
            return {"device": dict(self.device), "parts": {}}
        earlier = _read_results(file)
        if all(earlier["device"].get(name, value) == value for name, value in self.device.items()):
            return earlier | {"device": dict(self.device)}
        card = "".join(letter if letter.isalnum() else "_" for letter in earlier["device"]["card"] or "cpu")
        for old in (file, self.output / TABLE):
            if old.is_file():
                old.replace(self.output / f"{old.stem}_{card}{old.suffix}")
        print(f"the earlier results are of another card or other versions; they are now gpu_{card}.json", flush=True)
        return {"device": dict(self.device), "parts": {}}

    def save(self, part: Part | None, end: Mapping[str, Any]) -> None:
        """Write gpu.json and gpu.md; notes that a person added to the JSON stay at the end of the table."""
        if part is not None:
            self.results["parts"][part.name] = {**end, "sources": self.sources}
        for name in LISTS:
            self.results[name] = read_lines(self.lines / f"{name}.jsonl")
        notes = f"\n{self.results['notes']}\n" if "notes" in self.results else ""
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / RESULT).write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        (self.output / TABLE).write_text(describe(self.results) + notes, encoding="utf-8")


def _read_results(file: Path) -> dict[str, Any]:
    """Read the results of an earlier call; the program ends where they are damaged, and they stay as they are."""
    advice = f"restore {file}, or move it away to measure anew"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{file}: cannot be read ({error}); {advice}") from error
    objects = ("device", "parts", "states")
    is_whole = isinstance(found, dict) and all(isinstance(found.get(name, {}), dict) for name in objects)
    if not is_whole or not {"device", "parts"}.issubset(found) or not isinstance(found["device"].get("card"), str):
        raise SystemExit(f"{file}: is no result of this program, which holds the objects device and parts; {advice}")
    for name in LISTS:
        rows = found.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise SystemExit(f"{file}: {name} is no list of objects; {advice}")
    return found
