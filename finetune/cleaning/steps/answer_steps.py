"""The steps that look at whether answers are true, and at how many rows of each group stay."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finetune.cleaning.row_spool import Candidate
from finetune.cleaning.step_form import CleanContext, Drop, StepResult
from finetune.cleaning.steps.kinds import name_kinds
from finetune.data.languages import name_language
from finetune.data.lint.text_checks import shorten
from finetune.errors import DataError, describe_count
from finetune.rewards.rules import Answer, judge_final_answer

_MOST_GROUPS = 12


def drop_wrong_answers(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop rows whose final answer differs from the true one, by the rule of the reward `final_answer`.

    Rows without the key of the true answer stay, and are counted in a note.
    """
    key, result, unknown = context.section.verify.truth, StepResult(), 0
    for row in rows:
        content = context.spool.read(row)
        truth = (content.raw or {}).get(key)
        if truth is None or isinstance(truth, list | dict):
            unknown += 1
            continue
        answer = Answer(content.question, content.last_answer, str(truth))
        if not judge_final_answer(answer):
            text = f"{shorten(str(truth))!r} is true: …{shorten(content.last_answer[-160:])}"
            result.dropped[row.number] = Drop("wrong answer", text)
    if unknown:
        result.notes.append(
            f"{describe_count(unknown, 'row has', 'rows have')} no true answer under {key!r} and cannot be verified"
        )
    return result


def drop_surplus(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Draw rows by the seed so that the groups have their shares, as many as there can be without repeating one.

    Raises:
        DataError: a group has no row, so that no number of rows has the shares.
    """
    section, result = context.section.mix, StepResult()
    groups: dict[str, list[int]] = {name: [] for name in section.shares}
    seen = Counter[str]()
    for row, kind in zip(rows, _list_kinds(context, rows), strict=True):
        content = context.spool.read(row)
        language = name_language("\n".join((content.question, content.trained)))
        group = f"{kind} {language}".strip()
        seen[group] += 1
        name = next((name for name in (f"{kind} {language}", kind, language) if name in groups), None)
        if name is None:
            result.dropped[row.number] = Drop("in no group", f"{group}: {shorten(content.question)}")
        else:
            groups[name].append(row.number)
    _check_groups(groups, seen)
    counts = share_out({name: len(found) for name, found in groups.items()}, section.shares, section.rows)
    for name, numbers in groups.items():
        drawn = set(random.Random(f"{context.resolved.recipe.seed} {name}").sample(numbers, counts[name]))
        for number in numbers:
            if number not in drawn:
                result.dropped[number] = Drop(
                    f"not drawn from {name}", f"{counts[name]:,} of {len(numbers):,} are drawn"
                )
    return result


def _check_groups(groups: Mapping[str, list[int]], seen: Counter[str]) -> None:
    """Refuse groups without rows."""
    if empty := [name for name, numbers in groups.items() if not numbers]:
        found = ", ".join(f"{name} ({count:,})" for name, count in seen.most_common(_MOST_GROUPS)) or "no rows at all"
        raise DataError(
            f"clean.mix.shares: no row is of the group {' or of '.join(empty)}, so no row could stay; found are {found}; take it out of "
            "the shares, or give rows of it"
        )


def _list_kinds(context: CleanContext, rows: Sequence[Candidate]) -> Iterator[str]:
    """Yield the kind of each row: what the classifier says, or what stands under the key; empty where neither is named."""
    section = context.section.mix
    if section.classifier:
        yield from name_kinds(context, rows, Path(section.classifier))
    elif section.key:
        yield from (str((context.spool.read(row).raw or {}).get(section.key, "")) for row in rows)
    else:
        yield from itertools.repeat("", len(rows))


def share_out(found: Mapping[str, int], shares: Mapping[str, float], most: int | None) -> dict[str, int]:
    """Return the rows of each group: in proportion to `shares`, at most those that were found and `most` in all."""
    total = sum(shares.values())
    # A tiny tolerance, so that 39 rows of a share of 0.39 make 100 rows in spite of rounding.
    largest = min((found[name] * total / share + 1e-9 for name, share in shares.items() if share > 0), default=0.0)
    size = int(largest) if most is None else min(int(largest), most)
    exact = {name: size * share / total for name, share in shares.items()}
    counts = {name: int(share + 1e-9) for name, share in exact.items()}
    left = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in left[: size - sum(counts.values())]:
        counts[name] += counts[name] < found[name]
    return counts
