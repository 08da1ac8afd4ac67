"""The step `judge`: a model scores each answer, and the lowest leave.

Source: YuLan-Mini (arXiv 2412.17743), post-training: the lowest percentiles of the mean of three scores are dropped.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence

from finetune.cleaning.row_spool import Candidate
from finetune.cleaning.step_form import CleanContext, Drop, StepResult
from finetune.data.lint.text_checks import shorten
from finetune.errors import describe_count
from finetune.synthesis.endpoints.endpoint import open_endpoint
from finetune.synthesis.endpoints.questioning import Skip
from finetune.synthesis.judging import judge_conversations, mean_score
from finetune.synthesis.prompts import Prompt


def drop_lowest(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop the share `drop_lowest` of the rows with scores, those with the lowest mean. Rows without a score stay."""
    section, result = context.section.judge, StepResult()
    with contextlib.closing(open_endpoint(section.endpoint, context.resolved.recipe.endpoints)) as endpoint:
        found = judge_conversations(
            endpoint,
            Prompt("judge", section.prompt),
            len(rows),
            lambda number: context.spool.read(rows[number]).messages,
            section.max_tokens,
            section.attempts,
        )
    means: dict[int, float] = {}
    missing: Counter[str] = Counter()
    for row, scores in zip(rows, found, strict=True):
        if isinstance(scores, Skip):
            missing[scores.kind] += 1
            continue
        means[row.number] = mean_score(scores)
        result.scores[row.number] = {**scores, "judge": means[row.number]}
    # Of equal rows the later one leaves first.
    ordered = sorted(means, key=lambda number: (means[number], -number))
    places = {row.number: row for row in rows}
    for number in ordered[: int(section.drop_lowest * len(ordered) + 1e-9)]:
        text = shorten(context.spool.read(places[number]).trained)
        result.dropped[number] = Drop("lowest scores", f"{means[number]:.2f}: {text}")
    result.notes += [
        f"{describe_count(count, 'row got no score and stays', 'rows got no score and stay')}: {kind}"
        for kind, count in sorted(missing.items())
    ]
    return result
