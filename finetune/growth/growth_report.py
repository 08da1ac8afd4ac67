"""What many checkpoints side by side gave: as a table and sentences for a person, as JSON, and as CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.evaluation.tasks.task_forms import Figure
from finetune.files.json_files import write_json, write_text
from finetune.files.terminal import escape_controls
from finetune.growth.scores.paired_tests import SIGNIFICANCE, StepTest
from finetune.growth.scores.score_lines import Origin, ScoreLine, describe_p
from finetune.growth.weights.weight_changes import TensorEntry

REPORT_FILE, SCORES_TABLE, WEIGHTS_TABLE = "dynamics.json", "scores.csv", "weights.csv"
TEXT_FILE = "report.md"
_TEST_KEYS = ("test", "change", "p", "low", "high", "gained", "lost")


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint: its name, the tokens it has seen, its weights' figures, and what the models did with a few rows.

    `tuned` is what the same fine-tuning gave, if one was asked for.
    """

    name: str
    tokens: int | None
    commit: str | None = None
    weights: tuple[TensorEntry, ...] = ()
    activity: Mapping[str, Any] | None = None
    tuned: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Growth:
    """All checkpoints in the given order, and a line for each score."""

    output: str
    protocol: str
    checkpoints: tuple[CheckpointEntry, ...]
    lines: tuple[ScoreLine, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checkpoints."""
        return tuple(entry.name for entry in self.checkpoints)

    @property
    def sentences(self) -> list[str]:
        """What changed really, and what did not."""
        steps = [sentence for line in self.lines for sentence in line.describe_steps(self.names)]
        return steps + [line.describe_best(self.names) for line in self.lines if line.origin == "tuned"]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "output": self.output,
            "protocol": self.protocol,
            "significance": SIGNIFICANCE,
            "checkpoints": [self._describe(number, entry) for number, entry in enumerate(self.checkpoints)],
            "sentences": self.sentences,
            "notes": list(self.notes),
            "weights": {entry.name: [one.to_json() for one in entry.weights] for entry in self.checkpoints},
        }

    def _describe(self, number: int, entry: CheckpointEntry) -> dict[str, Any]:
        def gather(origin: Origin) -> tuple[dict[str, Any], dict[str, Any]]:
            scores: dict[str, Any] = {}
            tests: dict[str, Any] = {}
            for line in self.lines:
                figure, test = line.figures[number], line.find_step(number)
                if line.origin == origin and figure is not None:
                    plain = {**asdict(figure), "n": line.rows, "unit": line.unit}
                    scores.setdefault(line.task, {})[line.measure] = plain
                    if test is not None:
                        tests.setdefault(line.task, {})[line.measure] = {
                            **asdict(test),
                            "of": line.tested,
                            "unit": line.test_unit,
                        }
            return scores, tests

        found: dict[str, Any] = {"name": entry.name, "tokens": entry.tokens, "commit": entry.commit}
        found["scores"], tests = gather("measured")
        found["published"], published_tests = gather("published")
        found["tests"] = {"measured": tests, "published": published_tests}
        if entry.tuned is not None:
            scores, tests = gather("tuned")
            found["tuned"] = {**entry.tuned, "scores": scores}
            found["tests"]["tuned"] = tests
        if entry.activity is not None:
            found["activity"] = dict(entry.activity)
        return found

    def describe(self) -> str:
        """Return the table and the sentences."""
        blocks = ["\n".join(self._tabulate(group)) for group in group_lines(self.lines)]
        if any(entry.tuned is not None for entry in self.checkpoints):
            blocks.append("\n".join(self._tabulate_tuned()))
        if any(entry.activity is not None for entry in self.checkpoints):
            blocks.append("\n".join(self._tabulate_activity()))
        if self.sentences:
            note = f"Changes that chance makes in less than {SIGNIFICANCE:.0%} of cases are called real; p is for one comparison."
            blocks.append("\n".join([*self.sentences, note]))
        blocks += ["\n".join(f"note: {text}" for text in self.notes)] if self.notes else []
        blocks += [f"written: {self.output}"] if self.output else []
        return "\n\n".join(blocks)

    def _tabulate(self, group: Sequence[ScoreLine]) -> Iterator[str]:
        line = group[-1]
        changes = "" if line.tested == line.measure else f"; changes are those of the {line.tested}, {line.test_unit}"
        yield f"{line.name}{f', {line.unit}' if line.unit else ''} (n = {line.rows:,}){changes}"
        head = ["checkpoint", "tokens"]
        for one in group:
            head += [one.origin, "±", "change", "p"]
        rows = [head]
        for number, entry in enumerate(self.checkpoints):
            row = [entry.name, describe_tokens(entry.tokens)]
            for one in group:
                row += [*_show_figure(one.figures[number]), *_show_test(one.find_step(number))]
            rows.append(row)
        yield from align(rows)

    def _tabulate_tuned(self) -> Iterator[str]:
        yield "after the same fine-tuning"
        rows = [["checkpoint", "steps", "training loss", "held-out loss"]]
        for entry in self.checkpoints:
            tuned = entry.tuned or {}
            held = tuned.get("eval_loss")
            rows.append(
                [
                    entry.name,
                    str(tuned.get("steps", "")),
                    f"{tuned.get('train_loss', float('nan')):.4f}",
                    "" if held is None else f"{held:.4f}",
                ]
            )
        yield from align(rows)

    def _tabulate_activity(self) -> Iterator[str]:
        yield "loss on the texts of --rows, nats per token"
        found = [entry.activity or {} for entry in self.checkpoints]
        names = list(dict.fromkeys(name for one in found for name in one.get("sources", ())))
        rows = [["checkpoint", "all", *names]]
        for entry, one in zip(self.checkpoints, found, strict=True):
            losses = [one.get("loss"), *(one.get("sources", {}).get(name, {}).get("loss") for name in names)]
            rows.append([entry.name, *("" if loss is None else f"{loss:.4f}" for loss in losses)])
        yield from align(rows)


def group_lines(lines: Sequence[ScoreLine]) -> list[list[ScoreLine]]:
    """Return the lines of each score together, in the order in which the scores come."""
    groups: dict[str, list[ScoreLine]] = {}
    for line in lines:
        groups.setdefault(line.name, []).append(line)
    return list(groups.values())


def describe_tokens(tokens: int | None) -> str:
    """Return a number of tokens for a person."""
    if tokens is None:
        return ""
    for size, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g} {name}"
    return str(tokens)


def align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows of a table as lines, the first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _show_figure(figure: Figure | None) -> tuple[str, str]:
    if figure is None:
        return "", ""
    return _show(figure.value), "" if figure.stderr is None else _show(figure.stderr)


def _show(value: float) -> str:
    """Write a number with two decimals, or with four digits where it is large; perplexities of weak models reach 1e10."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3e}"


def _show_test(test: StepTest | None) -> tuple[str, str]:
    return (
        ("", "") if test is None else (f"{test.change:+.3g}", describe_p(test.p).removeprefix("p ").removeprefix("= "))
    )


def write_report(growth: Growth, folder: Path, pictures: Sequence[str]) -> None:
    """Write the report as JSON and text, and the tables of scores and weights as CSV.

    They do not name their folder, so that equal comparisons have equal files, wherever they lie.
    """
    growth = replace(growth, output="")  # which is the last line of the text
    write_text(folder / SCORES_TABLE, _write_csv(_list_scores(growth)))
    if any(entry.weights for entry in growth.checkpoints):
        write_text(folder / WEIGHTS_TABLE, _write_csv(_list_weights(growth)))
    shown = "\n".join(f"![{picture}]({picture})" for picture in pictures)
    text = escape_controls(growth.describe()).replace("`", "'")  # names of folders must not end the block
    write_text(folder / TEXT_FILE, f"# Checkpoints side by side\n\n```\n{text}\n```\n\n{shown}\n")
    write_json(folder / REPORT_FILE, {key: value for key, value in growth.to_json().items() if key != "output"})


def _list_scores(growth: Growth) -> Iterator[dict[str, Any]]:
    for line in growth.lines:
        for number, entry in enumerate(growth.checkpoints):
            figure, test = line.figures[number], line.find_step(number)
            if figure is None:
                continue
            tested: Mapping[str, Any] = {} if test is None else asdict(test)
            yield {
                "checkpoint": entry.name,
                "tokens": entry.tokens,
                "task": line.task,
                "measure": line.measure,
                "origin": line.origin,
                "n": line.rows,
                "unit": line.unit,
                **asdict(figure),
                **{key: tested.get(key) for key in _TEST_KEYS},
            }


def _list_weights(growth: Growth) -> Iterator[dict[str, Any]]:
    for entry in growth.checkpoints:
        for one in entry.weights:
            yield {"checkpoint": entry.name, "tokens": entry.tokens, **one.to_json()}


def _write_csv(rows: Iterator[Mapping[str, Any]]) -> str:
    listed = list(rows)
    if not listed:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(listed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return stream.getvalue()
