"""Run the job of a recipe's section `synthesize`: new rows from prompts, texts or rows, in a folder that is whole or absent.

A run that was stopped is started again with the same command: answers that were paid for come from the cache.
"""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.data.encoding.template import list_rendered_thoughts
from finetune.data.lint.row_writer import RowWriter
from finetune.data.reading.row_reader import RowReader
from finetune.data.settings import RowShape
from finetune.errors import DataError, RecipeError, describe_count
from finetune.files.folders import check_output_free, write_folder
from finetune.files.json_files import write_json
from finetune.files.version import read_version
from finetune.recipe.sections import to_plain
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.run_files import WRITTEN_ROWS_FILE
from finetune.synthesis.endpoints.budget import Spent
from finetune.synthesis.endpoints.endpoint import open_endpoint
from finetune.synthesis.jobs import JOBS, JobContext, JobKind, Seed, read_seed
from finetune.synthesis.scoring import Scorer
from finetune.training.training_rows import find_data_seed, open_data

logger = logging.getLogger(__name__)

RECORD = "synthesize.json"
_CHUNK = 64
_MOST_EXAMPLES = 5


@dataclass
class SynthesizeReport:
    """The outcome: `seeds` rows were read, `rows` were made, `left_out` counts what is missing by reason.

    `requests`, `cached` and `tokens` are those of this run. Of a dry run, they are what is coming, and `tokens` is an upper bound.
    """

    output: str
    job: str
    seeds: int = 0
    rows: int = 0
    requests: int = 0
    cached: int = 0
    tokens: int = 0
    cost: float = 0.0
    left_out: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def count_requests(resolved: ResolvedRecipe) -> SynthesizeReport:
    """Return how many requests and tokens a run would take, without asking anything. Requests to a judge are not counted.

    Raises:
        FinetuneError: the recipe has no job, or its rows cannot be used.
    """
    kind = _find_job(resolved)
    section = resolved.recipe.synthesize
    report = SynthesizeReport("", kind.name)
    with contextlib.closing(open_endpoint(section.endpoint, resolved.recipe.endpoints)) as endpoint:
        for seed in _read_seeds(resolved, kind, report):
            report.seeds += 1
            for request in kind.ask(section, seed):
                if endpoint.is_known(request):
                    report.cached += 1
                else:
                    report.requests += 1
                    report.tokens += request.characters + request.max_tokens
    return report


def synthesize_rows(resolved: ResolvedRecipe, output: Path) -> SynthesizeReport:
    """Write the rows that the recipe's job makes into a new folder.

    Raises:
        FinetuneError: the recipe has no job, an endpoint cannot be asked, a limit is reached, or the folder cannot be written.
    """
    kind = _find_job(resolved)
    check_output_free(output)
    section, endpoints = resolved.recipe.synthesize, resolved.recipe.endpoints
    report = SynthesizeReport(str(output), kind.name)
    with (
        contextlib.closing(open_endpoint(section.endpoint, endpoints)) as endpoint,
        contextlib.closing(Scorer(section, endpoints)) as scorer,
        write_folder(output) as folder,
    ):
        _make_rows(resolved, JobContext(section, endpoint, scorer), kind, folder, report)
        if not report.rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.left_out.items())
            cure = kind.advice if reasons else "give rows in data.train"
            raise DataError(
                f"synthesize: no row was made ({reasons or 'there are no rows to read'}), and nothing was written; {cure}"
            )
        write_json(folder / RECORD, _make_record(resolved, report))
        judge = [scorer.judge.budget.spent] if scorer.judge is not None else []
        return _add_spent(report, [endpoint.budget.spent, *judge])


def _make_rows(
    resolved: ResolvedRecipe, context: JobContext, kind: JobKind, folder: Path, report: SynthesizeReport
) -> None:
    """Write the rows of all seeds, a chunk of seeds at a time, and count them in the report."""
    left_out, writer = Counter[str](), RowWriter(folder)
    seeds = _read_seeds(resolved, kind, report)
    with contextlib.closing(writer):
        while chunk := list(itertools.islice(seeds, _CHUNK)):
            for seed, made in zip(chunk, kind.make(context, chunk), strict=True):
                for row in made.rows:
                    writer.write("train", WRITTEN_ROWS_FILE, row)
                left_out.update(skip.kind for skip in made.skips)
                room = _MOST_EXAMPLES - len(report.examples)
                report.examples += [f"{seed.place}: {skip.kind}: {skip.text}" for skip in made.skips][:room]
            report.seeds += len(chunk)
            logger.info("%s rows read, %s rows made", f"{report.seeds:,}", f"{writer.counts[WRITTEN_ROWS_FILE]:,}")
    report.rows, report.left_out = writer.counts[WRITTEN_ROWS_FILE], dict(sorted(left_out.items()))


def _add_spent(report: SynthesizeReport, spent: list[Spent]) -> SynthesizeReport:
    report.requests, report.cached = sum(own.requests for own in spent), sum(own.cached for own in spent)
    report.tokens, report.cost = sum(own.tokens for own in spent), sum(own.cost for own in spent)
    return report


def _find_job(resolved: ResolvedRecipe) -> JobKind:
    if resolved.recipe.synthesize.job not in JOBS:
        raise RecipeError("synthesize", [f"synthesize.job: is missing; set one of {', '.join(JOBS)}"])
    return JOBS[resolved.recipe.synthesize.job]


def _read_seeds(resolved: ResolvedRecipe, kind: JobKind, report: SynthesizeReport) -> Iterator[Seed]:
    settings, tokenizer, template = open_data(resolved)
    shape: RowShape = "prompt" if kind.needs == "prompt" else "sequence"
    settings = replace(settings, shape=shape, needs_answer=None, evaluation=())
    reader = RowReader(settings, find_data_seed(resolved.recipe), list_rendered_thoughts(tokenizer, template))
    for source in reader.read():
        yield read_seed(kind, source.place, source.row)
    report.notes += reader.describe()


def _make_record(resolved: ResolvedRecipe, report: SynthesizeReport) -> dict[str, Any]:
    """Return what is needed to repeat the run; nothing in it depends on the moment or on the cache."""
    recipe = to_plain(resolved.recipe)
    return {
        "version": read_version(),
        "recipe": {key: recipe[key] for key in ("data", "endpoints", "synthesize", "seed") if key in recipe},
        "seeds": report.seeds,
        "rows": report.rows,
        "left_out": report.left_out,
    }


def describe_synthesis(report: SynthesizeReport) -> str:
    """Return the report for a terminal."""
    lines = [*report.notes]
    if not report.output:
        lines.append(
            f"{report.job}: {describe_count(report.seeds, 'row')} to read; {describe_count(report.requests, 'request is', 'requests are')} coming, with "
            f"at most {describe_count(report.tokens, 'token')}, and "
            f"{describe_count(report.cached, 'answer is', 'answers are')} known"
        )
        return "\n".join(lines)
    lines.append(
        f"{report.job}: {describe_count(report.rows, 'row')} made of {report.seeds:,}: {report.output}/{WRITTEN_ROWS_FILE}"
    )
    lines.append(
        f"{describe_count(report.requests, 'request')}, {describe_count(report.tokens, 'token')}, cost {report.cost:.4g}; "
        f"{describe_count(report.cached, 'answer was', 'answers were')} known"
    )
    lines += [f"  {count:,} {reason}" for reason, count in report.left_out.items()]
    lines += [f"    {example}" for example in report.examples]
    return "\n".join(lines)
