"""Keep what a task gave for each row in a file of JSON lines, and the figures over all rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from finetune.errors import OutputError
from finetune.evaluation.tasks.task_forms import Measure, Sample
from finetune.files.folders import check_writable
from finetune.files.json_files import read_json, write_json, write_text
from finetune.files.safety.disk_errors import translate_os_errors

SETTINGS_FILE, RESULTS_FILE = "evaluation.json", "results.json"
# Begins the key of a task's rows in the settings.
ROWS = "rows of "
_GOLD = ("gold_bits", "gold_bytes")
_KEPT = "the samples before it are kept; the same command continues"


@dataclass(frozen=True)
class TaskResult:
    """The figures of one task.

    `metric` and `stderr` go by the names of the protocol; `bits_per_byte` is that of the gold answers of a generated task.
    `notes` say what differs from the protocol. `file` holds the samples.
    """

    task: str
    protocol: str
    n: int
    metric: Mapping[str, float]
    stderr: Mapping[str, float | None]
    bits_per_byte: float | None
    file: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The results of one model on tasks, by the name of the task."""

    model: str
    protocol: str
    folder: str
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the results as plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def describe(self) -> str:
        """Return a table for a person."""
        lines = [f"{self.model}, protocol {self.protocol}"]
        for result in self.tasks.values():
            for name, value in result.metric.items():
                error = result.stderr[name]
                spread = "" if error is None else f" ± {error:.4g}"
                lines.append(f"{result.task:<10} {name:<11} {value:.6g}{spread}  (n = {result.n:,})")
            if result.bits_per_byte is not None:
                lines.append(f"{result.task:<10} {'bits/byte':<11} {result.bits_per_byte:.6g}  (of the gold answers)")
            lines += [f"{result.task:<10} note: {note}" for note in result.notes]
        return "\n".join([*lines, f"samples: {self.folder}"])


class SampleFile:
    """The samples of one task: a line for each row, written as it is known; without a file they stay in memory."""

    def __init__(self, file: Path | None = None, is_whole: Callable[[Sample], bool] = bool) -> None:
        """Read the whole lines that an earlier call wrote; half a line, and one that `is_whole` refuses, is removed."""
        self.file, self._is_whole = file, is_whole
        self.samples: dict[int, Sample] = {}
        if file is not None:
            self._read(file)

    def _read(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        whole = [line for line in text.split("\n")[:-1] if self._keep(line)]
        if text != "".join(f"{line}\n" for line in whole):
            with translate_os_errors(file, _KEPT):
                write_text(file, "".join(f"{line}\n" for line in whole))

    def _keep(self, line: str) -> bool:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(sample, dict) or type(sample.get("row")) is not int or not self._is_whole(sample):
            return False
        self.samples[sample["row"]] = sample
        return True

    def add(self, row: int, sample: Sample) -> None:
        """Append a sample.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        self.samples[row] = {"row": row, **sample}
        if self.file is None:
            return
        with translate_os_errors(self.file, _KEPT), self.file.open("a", encoding="utf-8", newline="\n") as stream:
            _write_line(stream, self.samples[row])


def holds_figures(measures: Sequence[Measure]) -> Callable[[Sample], bool]:
    """Return the function that tells whether a sample holds the numbers of all measures, and those of its gold answer if it has them."""

    def is_whole(sample: Sample) -> bool:
        fields = [measure.field for measure in measures]
        fields += _GOLD if any(name in sample for name in _GOLD) else ()
        return all(isinstance(sample.get(name), int | float) for name in fields)

    return is_whole


def _write_line(stream: IO[str], sample: Sample) -> None:
    # ASCII, because a generated text may hold halves of characters.
    stream.write(json.dumps(sample) + "\n")


def make_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of an evaluation; one that is there stays as it is.

    Raises:
        OutputError: it cannot be written.
    """
    if not (folder / SETTINGS_FILE).exists():
        with translate_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SETTINGS_FILE, settings)


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that a folder can be made, or that it holds an evaluation with the same settings.

    Raises:
        OutputError: it holds something else, or cannot be made.
    """
    written = read_json(folder / SETTINGS_FILE)
    if written is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists and holds no evaluation; choose another folder with -o")
        check_writable(folder)
        return
    if not isinstance(written, dict):
        raise OutputError(
            f"{folder / SETTINGS_FILE}: holds no JSON object; the folder is damaged: choose another with -o"
        )
    for file in folder.glob("*.jsonl"):
        if file.is_dir():
            raise OutputError(
                f"{file}: is a folder, where samples should be; remove it, or choose another folder with -o"
            )
    held, asked = ([name.removeprefix(ROWS) for name in one if name.startswith(ROWS)] for one in (written, settings))
    if any(task not in held for task in asked):
        raise OutputError(
            f"{folder}: holds an evaluation of other tasks ({', '.join(held) or 'none of these'}; now {', '.join(asked)}); choose another "
            "folder with -o"
        )
    differs = [name for name, value in settings.items() if written.get(name) != value]
    if differs:
        name = differs[0]
        raise OutputError(
            f"{folder}: holds an evaluation with another {name} ({written.get(name)}; now {settings[name]}); choose another folder "
            "with -o, or remove it"
        )


def summarise(
    measures: Sequence[Measure], samples: Sequence[Sample]
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Return the value and the standard error of every measure."""
    figures = {
        measure.name: measure.summarise([float(sample[measure.field]) for sample in samples]) for measure in measures
    }
    return {name: one.value for name, one in figures.items()}, {name: one.stderr for name, one in figures.items()}


def weigh_gold(samples: Sequence[Sample]) -> float | None:
    """Return the bits of all gold answers over their bytes, or None for a task that measures none, or not those of all samples."""
    if not all("gold_bits" in sample for sample in samples):
        return None
    total = sum(int(sample.get("gold_bytes", 0)) for sample in samples)
    return sum(float(sample["gold_bits"]) for sample in samples) / total if total else None
