"""Count the tokens that a checkpoint or a run has been trained on since its weights were random."""

from pathlib import Path

from finetune.checkpoints.checkpoint_table import find_published
from finetune.files.folders import expand_home
from finetune.files.json_files import read_json
from finetune.runs.results import find_earlier
from finetune.runs.run_files import (
    RECORD_FILE,
    count_tokens_seen,
    is_checkpoint_of_run,
    read_metrics,
    read_step,
)


def find_tokens_seen(name: str) -> int | None:
    """Return the tokens that a model has seen, or None where that is not recorded anywhere.

    Published checkpoints count 40 B tokens for each phase. A run counts its own tokens, those of the runs before it, and those of the
    checkpoint from which the first of them began.
    """
    result = find_earlier(name)
    if result is None:
        published = find_published(name)
        return None if published is None else published.tokens
    lineage = result.lineage
    if lineage is None:
        return None
    first = lineage.earlier[0].checkpoint if lineage.earlier else lineage.checkpoint
    published = find_published(first)
    runs = [*(entry.run for entry in lineage.earlier), name]
    counts = [None if published is None else published.tokens, *(_count_own_tokens(expand_home(run)) for run in runs)]
    return None if None in counts else sum(count for count in counts if count is not None)


def _count_own_tokens(path: Path) -> int | None:
    """Return the tokens that one run has seen, up to its checkpoint where `path` is one."""
    path = path.resolve()
    if is_checkpoint_of_run(path):
        lines = [line for line in read_metrics(path.parent) if line["step"] <= read_step(path)]
        return count_tokens_seen(lines) or None
    for folder in (path, path.parent):  # the folder of a result lies in its run
        record = read_json(folder / RECORD_FILE)
        if isinstance(record, dict) and isinstance(record.get("result"), dict):
            tokens = record["result"].get("tokens")
            return tokens if isinstance(tokens, int) and tokens > 0 else None
    return None
