"""What the two runs of a micro-annealing are compared by, line by line, and the verdict."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy

from finetune.growth.growth_report import align
from finetune.growth.scores.paired_tests import SIGNIFICANCE, StepTest, compare_means, resample_means
from finetune.growth.scores.score_lines import ScoreLine, describe_p
from finetune.pipeline.microanneal.anneal_plan import ARMS, NEW, OLD
from finetune.runs.run_files import HEAD_NORM, Z_TERM

Verdict = Literal["better", "worse", "no real difference"]
Stage = Literal["annealed", "tuned"]
IN_ALL = "in all"


@dataclass(frozen=True)
class RowLosses:
    """The summed loss of each row in nats under both models, and the tokens that it is summed over; arrays of shape (rows,)."""

    old: numpy.ndarray
    new: numpy.ndarray
    tokens: numpy.ndarray


@dataclass(frozen=True)
class AnnealLine:
    """One comparison; `change` is new less old in `unit`, with the paired test of it. `decides`: whether the verdict is this line's."""

    stage: Stage
    name: str
    unit: str
    rows: int
    old: float
    new: float
    test: StepTest
    is_better_high: bool
    decides: bool = False

    @property
    def verdict(self) -> Verdict:
        """Whether the candidate makes it better."""
        if not self.test.is_real:
            return "no real difference"
        return "better" if (self.test.change > 0) == self.is_better_high else "worse"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "verdict": self.verdict}


def compare_losses(name: str, stage: Stage, losses: RowLosses, *, decides: bool = False) -> AnnealLine:
    """Compare the mean loss of a token on the same rows, by the paired bootstrap of the rows."""
    total = losses.tokens.sum()
    old, new = float(losses.old.sum() / total), float(losses.new.sum() / total)
    rows = len(losses.tokens)
    draws = resample_means(numpy.column_stack([losses.old, losses.new]), losses.tokens)
    test = compare_means(new - old, draws[:, 0], draws[:, 1], rows)
    return AnnealLine(stage, name, "nats", rows, old, new, test, is_better_high=False, decides=decides)


def compare_scores(stage: Stage, lines: Sequence[ScoreLine]) -> Iterator[AnnealLine]:
    """Yield the comparison of every score of the tasks."""
    for line in lines:
        old, new = line.figures
        if old is None or new is None:
            continue
        name = line.name if line.tested == line.measure else f"{line.name} (its {line.tested} is tested)"
        # What is tested of a perplexity is the log-likelihood, of which more is better.
        is_better_high = line.is_better_high or line.tested != line.measure
        yield AnnealLine(
            stage,
            name,
            line.test_unit,
            line.rows,
            old.value,
            new.value,
            line.tests[0, 1],
            is_better_high=is_better_high,
        )


@dataclass(frozen=True)
class AnnealReport:
    """The result of a micro-annealing. `runs` and `curves` go by the names of the runs; `curves` holds logged lines."""

    output: str
    candidate: tuple[str, ...]
    share: float
    tokens: int
    start: str
    lines: tuple[AnnealLine, ...]
    runs: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    notes: tuple[str, ...] = field(default=())

    @property
    def deciding(self) -> AnnealLine:
        """The line that the verdict is about: the held-out loss in all."""
        return next(line for line in self.lines if line.decides)

    @property
    def sentence(self) -> str:
        """The verdict for a person."""
        line = self.deciding
        error = "" if line.test.stderr is None else f" ± {line.test.stderr:.4f}"
        figures = f"held-out loss {line.old:.4f} without it, {line.new:.4f} with it: {line.test.change:+.4f}{error} ({describe_p(line.test.p)})"
        return f"{', '.join(self.candidate)}, {self.share:.0%} of {self.tokens:,} tokens: {line.verdict}. {figures}"

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "verdict": self.deciding.verdict,
            "sentence": self.sentence,
            "output": self.output,
            "candidate": list(self.candidate),
            "share": self.share,
            "tokens": self.tokens,
            "from": self.start,
            "significance": SIGNIFICANCE,
            "lines": [line.to_json() for line in self.lines],
            "runs": [{"name": name, **run} for name, run in self.runs.items()],
            "curves": {name: list(lines) for name, lines in self.curves.items()},
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """Return the table and the sentences."""
        blocks = [
            self.sentence,
            "\n".join(align(list(self._tabulate()))),
            "\n".join(align(list(self._tabulate_runs()))),
        ]
        blocks.append(
            "± is the standard error of the change over the same held-out rows: it says nothing of what another seed of the training would "
            f"give. Changes that chance makes in less than {SIGNIFICANCE:.0%} of cases are called real; p is for one comparison."
        )
        blocks += ["\n".join(f"note: {text}" for text in self.notes)] if self.notes else []
        return "\n\n".join([*blocks, f"written: {self.output}"])

    def _tabulate(self) -> Iterator[list[str]]:
        yield ["held-out loss and scores", "rows", *ARMS.values(), "change", "±", "p", "verdict"]
        for line in self.lines:
            name = line.name if line.stage == "annealed" else f"after fine-tuning: {line.name}"
            error = "" if line.test.stderr is None else f"{line.test.stderr:.4f}"
            p = describe_p(line.test.p).removeprefix("p ").removeprefix("= ")
            figures = [f"{line.old:.4f}", f"{line.new:.4f}", f"{line.test.change:+.4f}", error]
            yield [name, f"{line.rows:,}", *figures, p, line.verdict]

    def _tabulate_runs(self) -> Iterator[list[str]]:
        yield ["run", "steps", "tokens", "training loss", "lm_head norm", "z term", "seconds"]
        for name, run in self.runs.items():
            shown = [self._show_curve(name, key) for key in (HEAD_NORM, Z_TERM)]
            cells = [
                f"{run['steps']:,}",
                f"{run['tokens']:,}",
                f"{run['train_loss']:.4f}",
                *shown,
                f"{run['seconds']:,.0f}",
            ]
            yield [ARMS.get(name, name), *cells]

    def _show_curve(self, run: str, key: str) -> str:
        """Return the first and the last point of a curve."""
        points = [line[key] for line in self.curves.get(run, ()) if key in line]
        return f"{points[0]:.4g} to {points[-1]:.4g}" if points else ""


def list_loss_lines(
    sources: Sequence[str], counted: Sequence[bool], losses: Mapping[str, numpy.ndarray], tokens: numpy.ndarray
) -> list[AnnealLine]:
    """Return the comparison in all, of the rows that count, and those of every source; `losses` go by the name of the run."""

    def take(chosen: Sequence[bool]) -> RowLosses:
        mask = numpy.array(chosen, dtype=bool)
        return RowLosses(losses[OLD][mask], losses[NEW][mask], tokens[mask])

    lines = [compare_losses(IN_ALL, "annealed", take(counted), decides=True)]
    for source, counts in dict.fromkeys(zip(sources, counted, strict=True)):
        name = source if counts else f"{source} (its own texts, not counted)"
        chosen = [(one, mark) == (source, counts) for one, mark in zip(sources, counted, strict=True)]
        lines.append(compare_losses(name, "annealed", take(chosen)))
    return lines
