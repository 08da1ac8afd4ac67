"""Run the steps of a recipe's section `clean` over its rows, and write the rows that stay.

The folder is written whole or not at all. A run that was killed is started again with the same command: everything is computed from
the same rows in the same order, and what was expensive (losses, answers of models) comes from the cache.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.cleaning.clean_page import render_clean_page
from finetune.cleaning.clean_report import CleanReport, DroppedExample, StepReport
from finetune.cleaning.row_spool import Candidate, RowSpool, add_provenance, read_checked_rows
from finetune.cleaning.step_form import CleanContext, StepResult
from finetune.cleaning.step_table import STEPS, Step
from finetune.data.lint.row_writer import RowWriter
from finetune.data.lint.text_checks import shorten
from finetune.data.reading.sources import describe_sources, hash_source
from finetune.errors import DataError, Place, RecipeError
from finetune.files.cache import hash_file
from finetune.files.folders import check_output_free, write_folder
from finetune.files.json_files import write_json
from finetune.files.version import read_version
from finetune.recipe.sections import to_plain
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.training_rows import open_data

logger = logging.getLogger(__name__)

RECORD, PAGE = "clean.json", "report.html"
_MOST_EXAMPLES = 5


def clean_rows(resolved: ResolvedRecipe, output: Path) -> CleanReport:
    """Run every step that the recipe names, and write the rows that stay with a report into a new folder.

    Raises:
        FinetuneError: no step is named, rows cannot be used, or the folder cannot be written; nothing is left there.
    """
    steps = [step for step in STEPS if step.is_on(resolved.recipe.clean)]
    check_clean(resolved, steps)
    check_output_free(output)
    settings, tokenizer, template = open_data(resolved)
    with write_folder(output) as folder, contextlib.closing(RowSpool(folder)) as spool:
        context = CleanContext(resolved, spool, tokenizer, template)
        checked = read_checked_rows(settings, tokenizer, template, resolved.recipe.clean.thresholds)
        rows = [spool.add(number, row, found) for number, (row, found) in enumerate(checked)]
        reports, alive, scores = run_steps(context, steps, rows)
        files = _write_rows(context, folder, alive, scores, [step.name for step in steps])
        notes = list(describe_sources(settings.train))
        report = CleanReport(str(output), len(rows), len(alive), reports, files, notes)
        sources = [{"source": str(source.location), "hash": hash_source(source)} for source in settings.train]
        write_json(folder / RECORD, _make_record(resolved, report, folder, sources))
        (folder / PAGE).write_text(render_clean_page(report), encoding="utf-8", errors="replace")
    return report


def check_clean(resolved: ResolvedRecipe, steps: Sequence[Step]) -> None:
    """Refuse a recipe without steps, or whose rows are not taken whole.

    Raises:
        RecipeError: with every problem.
    """
    if problems := list(_list_problems(resolved, steps)):
        raise RecipeError("clean", problems)


def _list_problems(resolved: ResolvedRecipe, steps: Sequence[Step]) -> Iterator[str]:
    if not steps:
        names = ", ".join(step.name for step in STEPS)
        yield f"clean: names no step; set at least one of {names}, such as clean: {{unreadable: true, exact_duplicates: true}}"
    data = resolved.recipe.data
    if data.mixture is not None:
        yield "data.mixture: `finetune clean` reads whole files; name them in data.train"
    for source in data.train:
        if not isinstance(source, str) and (source.weight is not None or source.rows is not None):
            yield f"data.train: {source.path or source.hub} has weight or rows, but all rows are cleaned; remove it, and use clean.mix"


def run_steps(
    context: CleanContext, steps: Sequence[Step], rows: Sequence[Candidate]
) -> tuple[list[StepReport], list[Candidate], dict[int, dict[str, float]]]:
    """Run the steps one after the other; return their reports, the rows that stay, and the scores of rows by number.

    Raises:
        DataError: a row cannot be read, and no step leaves such rows out.
        RuntimeError: a step lost a row or named one twice, which would be a fault of the kit.
    """
    reports: list[StepReport] = []
    scores: dict[int, dict[str, float]] = {}
    _check_readable(context, rows)
    alive = list(rows)
    for step in steps:
        result = step.run(context, alive)
        left = [row for row in alive if row.number not in result.dropped]
        if len(left) + len(result.dropped) != len(alive):
            raise RuntimeError(f"{step.name}: {len(alive)} rows in, {len(left)} out and {len(result.dropped)} dropped")
        for number, found in result.scores.items():
            scores.setdefault(number, {}).update(found)
        reports.append(_report_step(context, step, alive, left, result))
        logger.info("%s: %s of %s rows left", step.name, f"{len(result.dropped):,}", f"{len(alive):,}")
        alive = left
    if len(rows) != len(alive) + sum(report.dropped for report in reports):
        raise RuntimeError("the rows of the steps do not add up")
    return reports, alive, scores


def _check_readable(context: CleanContext, rows: Sequence[Candidate]) -> None:
    """Refuse files of which nothing can be read, and rows that are no rows, unless a step leaves these out."""
    counts = Counter(row.place.file for row in rows)
    for row in rows:
        if row.fault is not None and row.place.line is None and counts[row.place.file] == 1:
            raise DataError(f"{row.found[row.fault]}; mend the file, or take it out of data.train", row.place)
    bad = None if context.section.unreadable else next((row for row in rows if row.fault is not None), None)
    if bad is not None and bad.fault is not None:
        raise refuse_row(bad.found[bad.fault], bad.place)


def refuse_row(fault: str, place: Place) -> DataError:
    """Return the error for a row that is no row."""
    return DataError(f"{fault}; mend it, or set clean.unreadable: true to leave such rows out", place)


def _report_step(
    context: CleanContext, step: Step, rows: Sequence[Candidate], left: Sequence[Candidate], result: StepResult
) -> StepReport:
    dropped = [row for row in rows if row.number in result.dropped]
    kinds = Counter(drop.kind for drop in result.dropped.values())
    examples = []
    for row in dropped[:_MOST_EXAMPLES]:
        drop = result.dropped[row.number]
        content = context.spool.read(row)
        text = shorten(content.question or content.trained or str(content.raw or ""))
        examples.append(DroppedExample(row.place.file, row.place.line, f"{drop.kind}: {drop.text}", text))
    kept = [context.spool.read(row) for row in left[:_MOST_EXAMPLES]]
    return StepReport(
        step.name,
        len(rows),
        len(dropped),
        dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        examples,
        [shorten(content.question or content.trained) for content in kept],
        result.notes,
    )


def _write_rows(
    context: CleanContext,
    folder: Path,
    rows: Sequence[Candidate],
    scores: dict[int, dict[str, float]],
    steps: list[str],
) -> dict[str, int]:
    """Write the rows by source, each with what it has passed; return the rows of each file."""
    writer = RowWriter(folder)
    try:
        for row in rows:
            raw = context.spool.read(row).raw or {}
            writer.write("train", row.place.file, add_provenance(raw, row.place, steps, scores.get(row.number)))
    finally:
        writer.close()
    return dict(writer.counts)


def _make_record(
    resolved: ResolvedRecipe, report: CleanReport, folder: Path, sources: list[dict[str, str]]
) -> dict[str, Any]:
    """Return everything that is needed to repeat the cleaning, and its numbers; nothing in it depends on the moment."""
    recipe = to_plain(resolved.recipe)
    return {
        "version": read_version(),
        "recipe": {key: recipe[key] for key in ("model", "data", "clean", "seed") if key in recipe},
        "sources": sources,
        "rows_in": report.rows_in,
        "rows_out": report.rows_out,
        "steps": [asdict(step) for step in report.steps],
        "files": [
            {"file": name, "rows": rows, "sha256": hash_file(folder / name)} for name, rows in report.files.items()
        ],
    }
