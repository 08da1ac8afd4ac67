"""The table of a sweep: mean and spread over the seeds for each setting, and which differences are real."""

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune.errors import describe_count
from finetune.files.json_files import write_json, write_text
from finetune.files.terminal import escape_controls
from finetune.growth.growth_report import align
from finetune.growth.scores.paired_tests import SIGNIFICANCE, StepTest, compare_pairs
from finetune.growth.scores.score_lines import describe_p

REPORT_FILE, TEXT_FILE, TABLE_FILE, PICTURE_FILE = "sweep.json", "report.md", "sweep.csv", "sweep.png"


@dataclass(frozen=True)
class Outcome:
    """What one run has reached, or the message of its failure.

    `final` is that of the weights that were kept, `best` that of the best evaluation; both are None for a failed run, as are `steps`,
    `tokens` and `seconds`. `curve` holds (step, value) of every evaluation.
    """

    setting: str
    values: dict[str, str]
    seed: int
    run: str
    failed: str | None = None
    measure: str = "held-out loss"
    final: float | None = None
    best: float | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def name(self) -> str:
        """The setting and the seed."""
        return f"{self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and the standard deviation between them, which one seed does not tell."""

    mean: float
    spread: float | None


@dataclass(frozen=True)
class SettingResult:
    """What a setting has reached over its seeds; `against_best` compares its final values with those of the best setting by seed."""

    setting: str
    values: dict[str, str]
    finished: int
    failed: int
    final: Mean | None = None
    best: Mean | None = None
    seconds: Mean | None = None
    against_best: StepTest | None = None
    is_best: bool = False


@dataclass(frozen=True)
class SweepReport:
    """The runs of a sweep so far, of `planned` ones. `notes` say why they cannot be compared; there are none where they can.

    `others` names finished runs in the same folder that are none of this sweep's. `speed` says which ways of `model.speed` they train with.
    """

    recipe: str
    output: str
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]
    planned: int
    others: tuple[str, ...] = ()
    speed: tuple[str, ...] = ()

    @property
    def measure(self) -> str:
        """What the runs are compared by."""
        return next((one.measure for one in self.outcomes if one.final is not None), "held-out loss")

    @property
    def is_better_high(self) -> bool:
        """Whether a higher value is better, as of a reward."""
        return self.measure.endswith("reward")

    def list_settings(self) -> list[SettingResult]:
        """Return the result of each setting, in their order."""
        groups: dict[str, list[Outcome]] = {}
        for one in self.outcomes:
            groups.setdefault(one.setting, []).append(one)
        best = {} if self.notes else self._find_best(groups)
        return [self._summarise(group, best) for group in groups.values()]

    def _find_best(self, groups: dict[str, list[Outcome]]) -> dict[int, float]:
        """Return the final values by seed of the setting whose mean is best; one with a failed run is best only where all have one."""
        found = [(any(one.failed for one in group), _take(group, "final")) for group in groups.values()]
        sign = -1 if self.is_better_high else 1
        ranked = [
            (fails, sign * fmean(values.values()), number) for number, (fails, values) in enumerate(found) if values
        ]
        return found[min(ranked)[2]][1] if ranked else {}

    def _summarise(self, group: list[Outcome], best: dict[int, float]) -> SettingResult:
        final, first = _take(group, "final"), group[0]
        shared = sorted(final.keys() & best.keys())
        is_best = bool(final) and final == best
        test = None
        if len(shared) > 1 and not is_best:
            test = compare_pairs([best[seed] for seed in shared], [final[seed] for seed in shared])
        elif len(shared) == 1 and not is_best:
            test = StepTest("paired t", final[shared[0]] - best[shared[0]], 1.0)
        return SettingResult(
            first.setting,
            first.values,
            len(final),
            len(group) - len(final),
            _average(final),
            _average(_take(group, "best")),
            _average(_take(group, "seconds")),
            test,
            is_best,
        )

    @property
    def verdict(self) -> str:
        """Which setting is best, and which are not really worse."""
        settings = [one for one in self.list_settings() if one.final is not None]
        if self.notes and settings:
            return "none is called best, since their held-out rows differ"
        best = next((one for one in settings if one.is_best), None)
        if best is None or best.final is None:
            return "no run has finished"
        found = f"{best.setting}: {self.measure} {_show(best.final)}"
        others = [one for one in settings if one is not best]
        if not others:
            return f"{found} over {describe_count(best.finished, 'seed')}"
        if any(one.finished < 2 for one in settings):
            return f"best is {found}. Nobody can tell whether another seed would change the order: give --seeds 3 or more to see"
        level = [one.setting for one in others if one.against_best is not None and not one.against_best.is_real]
        worse = [one.setting for one in others if one.against_best is not None and one.against_best.is_real]
        sentences = [f"best is {found} over {describe_count(best.finished, 'seed')}"]
        sentences += [f"Really worse: {'; '.join(worse)}"] if worse else []
        sentences += [f"Not really worse: {'; '.join(level)}"] if level else []
        return ". ".join(sentences)

    @property
    def failures(self) -> list[str]:
        """A sentence for each run that failed."""
        return [f"failed: {one.name}: {one.failed}" for one in self.outcomes if one.failed is not None]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "recipe": self.recipe,
            "output": self.output,
            "measure": self.measure,
            "verdict": self.verdict,
            "significance": SIGNIFICANCE,
            "planned": self.planned,
            "settings": [asdict(one) for one in self.list_settings()],
            "runs": [asdict(one) for one in self.outcomes],
            "notes": self._list_notes(),
        }

    def describe(self) -> str:
        """Return the table and the sentences."""
        blocks = ["\n".join(align(list(self._tabulate())))]
        about = (
            "± is the standard deviation between seeds; the difference from the best is paired by seed, with its standard error. Differences that "
            f"chance makes in less than {SIGNIFICANCE:.0%} of cases are called real; p is for one comparison."
        )
        blocks.append("\n".join([self.verdict, about]))
        if len(self.outcomes) < self.planned:
            blocks.append(f"{len(self.outcomes)} of {self.planned} runs so far")
        blocks += ["\n".join([*self.failures, *(f"note: {text}" for text in self._list_notes())])]
        return "\n\n".join([*(block for block in blocks if block), f"written: {self.output}"])

    def _list_notes(self) -> list[str]:
        if not self.others:
            return [*self.notes, *self.speed]
        count = describe_count(len(self.others), "finished run in this folder is", "finished runs in this folder are")
        return [*self.notes, *self.speed, f"{count} not in the table: {', '.join(self.others)}"]

    def _tabulate(self) -> Iterator[list[str]]:
        yield ["setting", "seeds", self.measure, "±", "best in run", "±", "difference", "±", "p", "seconds"]
        for one in self.list_settings():
            seeds = f"{one.finished}" if not one.failed else f"{one.finished} ({one.failed} failed)"
            test, seconds = one.against_best, "" if one.seconds is None else f"{one.seconds.mean:,.0f}"
            compared = ["", "", ""]
            if test is not None:
                has_error = test.stderr is not None
                compared = [
                    f"{test.change:+.4f}",
                    f"{test.stderr:.4f}" if has_error else "",
                    describe_p(test.p) if has_error else "",
                ]
            cells = [
                *_cells(one.final),
                *_cells(one.best),
                *compared[:2],
                compared[2].removeprefix("p ").removeprefix("= "),
            ]
            yield [one.setting, seeds, *cells, seconds]


def _take(group: list[Outcome], field: str) -> dict[int, float]:
    """Return a number of every finished run of a setting, by seed."""
    return {one.seed: float(getattr(one, field)) for one in group if getattr(one, field) is not None}


def _average(values: dict[int, float]) -> Mean | None:
    numbers = list(values.values())
    return Mean(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None) if numbers else None


def _cells(one: Mean | None) -> tuple[str, str]:
    if one is None:
        return "", ""
    return f"{one.mean:.4f}", "" if one.spread is None else f"{one.spread:.4f}"


def _show(one: Mean) -> str:
    return f"{one.mean:.4f}" if one.spread is None else f"{one.mean:.4f} ± {one.spread:.4f}"


def write_sweep(report: SweepReport, folder: Path) -> None:
    """Write the report as JSON and text, and a line for each run as CSV."""
    stream = io.StringIO()
    keys = list(dict.fromkeys(key for one in report.outcomes for key in one.values))
    fields = ("seed", "measure", "final", "best", "steps", "tokens", "seconds", "failed", "run")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*keys, *fields])
    for one in report.outcomes:
        writer.writerow([*(one.values[key] for key in keys), *(getattr(one, name) for name in fields)])
    write_text(folder / TABLE_FILE, stream.getvalue())
    text = escape_controls(report.describe()).replace("`", "'")
    write_text(
        folder / TEXT_FILE, f"# Sweep of {report.recipe}\n\n```\n{text}\n```\n\n![{PICTURE_FILE}]({PICTURE_FILE})\n"
    )
    write_json(folder / REPORT_FILE, report.to_json())
