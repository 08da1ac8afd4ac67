"""The steps that look at texts: what cannot be read, the rules of `lint`, duplicates, and rows of an evaluation set."""

import math
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rensa import RMinHash

from finetune.cleaning.row_spool import Candidate, SpooledRow
from finetune.cleaning.step_form import CleanContext, Drop, StepResult
from finetune.data.lint.findings import KINDS
from finetune.data.lint.near_duplicates import NearIndex, list_word_groups, sign_text
from finetune.data.lint.text_checks import shorten
from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.sources import read_source
from finetune.data.settings import Source
from finetune.errors import Place, describe_count
from finetune.evaluation.tasks.task_data import read_task_rows
from finetune.evaluation.tasks.task_names import TASKS


def drop_unreadable(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop what cannot be read as a row: broken lines, turns out of order, empty texts."""
    return StepResult({row.number: Drop(row.fault, row.found[row.fault]) for row in rows if row.fault is not None})


def drop_by_rules(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop rows with a finding of a kind that the recipe names; a row counts under the gravest."""
    named = [name for name in KINDS if name in context.section.rules]
    result = StepResult()
    for row in rows:
        kind = next((name for name in named if name in row.found), None)
        if kind is not None:
            result.dropped[row.number] = Drop(kind, row.found[kind])
    return result


def drop_exact_duplicates(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop rows that are asked and trained the same as an earlier one, as for `data.deduplicate`."""
    result, first = StepResult(), dict[bytes, Place]()
    for row in rows:
        place = first.setdefault(row.digest, row.place)
        if place is not row.place:
            text = shorten(context.spool.read(row).trained)
            result.dropped[row.number] = Drop("duplicate", f"the same as {place}: {text}")
    return result


def drop_near_duplicates(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop rows whose trained text or question is nearly that of a row that stays.

    The best row stays where the recipe names a key for scores, else the first. Texts of few words are not compared.
    """
    section, result = context.section.near_duplicates, StepResult()
    threshold = section.threshold or 0.0
    indexes = {name: NearIndex(threshold, section.permutations) for name in section.compare}
    for row in _order_by_score(context, rows):
        content = context.spool.read(row)
        signatures = {
            name: signature
            for name in section.compare
            if (signature := sign_text(PARTS[name](content), section.ngram, section.permutations)) is not None
        }
        found = _find_near(indexes, signatures)
        if found is None:
            for name, signature in signatures.items():
                indexes[name].add(row.place, signature)
            continue
        name, place, share = found
        text = shorten(PARTS[name](content))
        result.dropped[row.number] = Drop(f"near duplicate ({name})", f"{share:.0%} the same as {place}: {text}")
    return result


def _find_near(indexes: Mapping[str, NearIndex], signatures: Mapping[str, RMinHash]) -> tuple[str, Place, float] | None:
    for name, signature in signatures.items():
        if near := indexes[name].find(signature):
            return name, *near
    return None


def _order_by_score(context: CleanContext, rows: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return the rows with the best first; those with equal scores, or with none, keep their order."""
    key = context.section.near_duplicates.best_by
    if not key:
        return rows
    return sorted(rows, key=lambda row: -_read_number((context.spool.read(row).raw or {}).get(key)))


def _read_number(value: object) -> float:
    """Return a score; what is no number comes last. A whole number may have more digits than a float takes."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        return -math.inf
    return float(max(-_LARGEST, min(_LARGEST, value)))


_LARGEST = sys.float_info.max


def _read_question(row: SpooledRow) -> str:
    return row.question


def _read_trained(row: SpooledRow) -> str:
    return row.trained


PARTS = {"trained": _read_trained, "question": _read_question}


def drop_contaminated(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop rows that share `ngram` consecutive words with a row of an evaluation set."""
    section, result = context.section.decontaminate, StepResult()
    held, short = read_held_groups(section.against, section.task_data, section.ngram)
    if short:
        result.notes.append(
            f"{describe_count(short, 'row of the evaluation sets has', 'rows of the evaluation sets have')} no text of {section.ngram} words, so nothing can share that many with them"
        )
    for row in rows:
        if match := find_shared(context.spool.read(row), held, section.ngram):
            result.dropped[row.number] = Drop("shared with an evaluation set", f"{held[match]}: {match}")
    return result


def find_shared(content: SpooledRow, held: Container[str], size: int) -> str | None:
    """Return the first group of words of a row, system messages left out, that an evaluation set holds too."""
    texts = (turn["content"] for turn in [*content.messages, *content.rejected] if turn["role"] != "system")
    return next((group for text in texts for group in list_word_groups(text, size) if group in held), None)


def read_held_groups(against: Sequence[str], task_data: str, size: int) -> tuple[dict[str, Place], int]:
    """Return every group of words of the evaluation sets with its first place, and the number of rows that have none.

    `against` names files, and tasks whose rows lie under `task_data`, or on the hub where it is empty.

    Raises:
        DataError: a file or a row cannot be read, or the rows of a task are not there.
    """
    held, short = dict[str, Place](), 0
    is_only_task = len(set(against) & set(TASKS)) == 1
    for name in against:
        for place, raw in _read_task(name, task_data, is_only_task) if name in TASKS else _read_file(name):
            groups = [group for text in _list_texts(raw) for group in list_word_groups(text, size)]
            short += not groups
            for group in groups:
                held.setdefault(group, place)
    return held, short


def _read_task(name: str, task_data: str, is_only_task: bool) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    data = Path(task_data) if task_data else None
    rows = read_task_rows(TASKS[name], data, is_only_task, option="clean.decontaminate.task_data")
    return ((Place(name, number, "row"), row) for number, row in enumerate(rows, 1))


def _read_file(name: str) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    for _, rows in read_source(Source(Path(name), split="evaluation")):
        for place, raw in rows:
            yield place, require_row(raw)


def _list_texts(value: Any) -> Iterator[str]:
    """Yield every text in a row, however deep it lies."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _list_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _list_texts(inner)
