"""What a cleaning reports, as data and as text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.errors import describe_count


@dataclass(frozen=True)
class DroppedExample:
    """A row that left: its place, the reason, and its beginning. `line` is None where the whole file is meant."""

    file: str
    line: int | None
    reason: str
    text: str


@dataclass
class StepReport:
    """One step: the rows that came in and that left, by kind of reason, with the first five of them and of those that stay."""

    name: str
    rows_in: int
    dropped: int
    kinds: dict[str, int] = field(default_factory=dict)
    examples: list[DroppedExample] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CleanReport:
    """All steps of a cleaning: `rows_in` = `rows_out` + the rows that each step dropped. `files` maps written files to rows."""

    output: str
    rows_in: int
    rows_out: int
    steps: list[StepReport]
    files: dict[str, int]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def describe_clean(report: CleanReport) -> str:
    """Return the report for a terminal."""
    return "\n".join(_list_lines(report))


def _list_lines(report: CleanReport) -> Iterator[str]:
    yield f"{describe_count(report.rows_in, 'row')} in, {describe_count(report.rows_out, 'row')} out"
    yield from report.notes
    for step in report.steps:
        yield ""
        yield f"{step.name}: {step.dropped:,} of {describe_count(step.rows_in, 'row')} left"
        for kind, count in step.kinds.items():
            yield f"  {count:,} {kind}"
        for example in step.examples:
            yield f"    {name_example(example)}  {example.reason}"
        yield from (f"  {note}" for note in step.notes)
    yield ""
    yield from (f"{report.output}/{name}: {describe_count(rows, 'row')}" for name, rows in report.files.items())


def name_example(example: DroppedExample) -> str:
    """Return the place of an example."""
    return example.file if example.line is None else f"{example.file}:{example.line}"
