"""Train the runs of a sweep one after the other, on the same rows; what has finished is not trained again."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from finetune.errors import FinetuneError, MachineError, TrainingError
from finetune.files.launcher import is_launched
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.pipeline.experiment_folder import hold_experiment
from finetune.pipeline.finishing import check_earlier_run, finish_compared, free_memory, read_summary
from finetune.pipeline.same_speed import describe_choices
from finetune.pipeline.sweeping.sweep_grid import RUNS_FOLDER, Sweep, SweptRun
from finetune.pipeline.sweeping.sweep_plot import draw_sweep
from finetune.pipeline.sweeping.sweep_report import Outcome, SweepReport, write_sweep
from finetune.runs.run_files import read_metrics
from finetune.training.training_rows import prepare_rows

logger = logging.getLogger(__name__)

_KEPT = "the runs are kept; the same command continues"
_BATCH_ROWS = 1000


def run_sweep(sweep: Sweep) -> SweepReport:
    """Train every run that has not finished, and write table, picture and JSON after each. A run that fails is named.

    All that the user can mend is looked for before the first run trains.

    Raises:
        FinetuneError: rows or the folder cannot be used, the folder holds runs of other recipes, or every run failed.
    """
    if is_launched():
        raise MachineError(
            "sweep: cannot run under accelerate launch or torchrun; start it without, or launch `finetune train` for each run"
        )
    with hold_experiment(sweep.output, RUNS_FOLDER, "sweep"):
        for run in sweep.runs:
            check_earlier_run(run.resolved)
        notes = _compare_rows(sweep.runs)
        others = _list_others(sweep)
        outcomes: list[Outcome] = []
        for number, run in enumerate(sweep.runs, 1):
            logger.info("run %d of %d: %s, seed %d", number, len(sweep.runs), run.setting, run.seed)
            outcome, was_done = _train(run)
            outcomes.append(outcome)
            free_memory()
            report = SweepReport(
                sweep.recipe,
                str(sweep.output),
                tuple(outcomes),
                notes,
                len(sweep.runs),
                others,
                _describe_speed(outcomes),
            )
            if was_done and number < len(sweep.runs):
                continue
            with translate_os_errors(sweep.output, _KEPT):
                draw_sweep(report, sweep.output)
                write_sweep(report, sweep.output)
    failed = [outcome for outcome in outcomes if outcome.failed is not None]
    if len(failed) == len(outcomes):
        raise TrainingError(f"{sweep.output}: every run failed; the first: {failed[0].name}: {failed[0].failed}")
    return report


def _list_others(sweep: Sweep) -> tuple[str, ...]:
    """Return the names of finished runs in the sweep's folder that this call does not make."""
    folder, own = sweep.output / RUNS_FOLDER, {run.resolved.output.name for run in sweep.runs}
    found = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(run.name for run in found if run.name not in own and read_summary(run) is not None))


def _describe_speed(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    return describe_choices({one.name: Path(one.run) for one in outcomes if one.failed is None})


def _compare_rows(runs: Sequence[SweptRun]) -> tuple[str, ...]:
    """Prepare the rows of every run, and return a note where the held-out ones differ, so that losses cannot be compared."""
    hashes: dict[str, str] = {}
    for run in runs:
        if run.setting in hashes:  # seeds share their rows
            continue
        try:
            hashes[run.setting] = _hash_rows(prepare_rows(run.resolved)[1].evaluation)
        except FinetuneError as error:
            raise FinetuneError(f"{run.setting}: {error}") from error
    if len(set(hashes.values())) < 2:
        return ()
    first = next(iter(hashes))
    others = [setting for setting, found in hashes.items() if found != hashes[first]]
    return (
        f"the held-out rows of {', '.join(others)} are not those of {first}, as tokens: their losses cannot be compared. Name "
        "held-out rows in data.eval that every setting keeps and reads the same way",
    )


def _hash_rows(rows: Dataset | None) -> str:
    digest = hashlib.sha256()
    if rows is not None:
        names = [name for name in rows.column_names if name not in ("place", "origin")]
        for batch in rows.select_columns(names).with_format("arrow").iter(_BATCH_ROWS):
            digest.update(json.dumps(batch.to_pydict(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _train(run: SweptRun) -> tuple[Outcome, bool]:
    """Train what is left of a run; return what it has reached, and whether it had finished before."""
    outcome = Outcome(run.setting, run.values, run.seed, str(run.resolved.output))
    try:
        finished = finish_compared(run.resolved, run.resolved.output.parent.glob("*"))
    except FinetuneError as error:
        logger.warning("%s, seed %d: failed: %s", run.setting, run.seed, error)
        return replace(outcome, failed=str(error)), False
    return _read_outcome(outcome, run, finished.summary), finished.was_done


def _read_outcome(outcome: Outcome, run: SweptRun, summary: dict[str, Any]) -> Outcome:
    """Return what a finished run has reached: the held-out loss, or for an online method the reward on held-out prompts."""
    name = "eval_reward" if run.resolved.method.is_online else "eval_loss"
    final, lines = summary[name], read_metrics(Path(outcome.run))
    curve = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
    curve = [(step, value) for step, value in curve if math.isfinite(value)]
    if final is None or not math.isfinite(final):
        return replace(outcome, failed=f"its last {name} is {final}, so it has no result")
    choose = max if run.resolved.method.is_online else min
    return replace(
        outcome,
        measure="held-out reward" if run.resolved.method.is_online else "held-out loss",
        final=final,
        best=choose([final, *(value for _, value in curve)]),
        steps=summary["steps"],
        tokens=summary["tokens"],
        seconds=summary["seconds"],
        curve=tuple(curve),
    )
