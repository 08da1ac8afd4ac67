"""The authors' own scores, tested before anything is measured."""

from collections.abc import Sequence

from finetune.checkpoints.checkpoint_table import CHECKPOINTS, SCORED_ROWS, find_published
from finetune.errors import CheckpointError
from finetune.growth.growth_report import CheckpointEntry, Growth
from finetune.growth.scores.score_lines import make_published_lines

_NOTE = (
    "which samples were right is not published, so these tests are not paired and find fewer real changes; HumanEval's 164 rows have 20 "
    "samples each, so its errors are smaller than shown"
)


def compare_published(names: Sequence[str]) -> Growth:
    """Put the published scores of checkpoints side by side, with a test of each step. Nothing is fetched.

    Raises:
        CheckpointError: one has no published score.
    """
    rows = [find_published(name) for name in names]
    for name, row in zip(names, rows, strict=True):
        if row is None or not row.scores:
            known = ", ".join(row.alias for row in CHECKPOINTS if row.scores)
            raise CheckpointError(f"{name}: has no published score; those that have are {known}")
    entries = tuple(
        CheckpointEntry(name, None if row is None else row.tokens) for name, row in zip(names, rows, strict=True)
    )
    lines = make_published_lines(rows, dict.fromkeys(SCORED_ROWS, "score"))
    return Growth("", "", entries, tuple(lines), (_NOTE,))
