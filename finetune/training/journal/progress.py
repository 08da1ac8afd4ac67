"""Show a progress bar and write `metrics.jsonl` while a run trains."""

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from finetune.errors import describe_count
from finetune.files.json_files import read_lines, remove_later_lines, write_text
from finetune.runs.run_files import METRICS_FILE

logger = logging.getLogger(__name__)

_FEWEST_LINES = 20
PREFLIGHT = "preflight"  # the prefix of the metrics of the evaluation before step 1, which only checks that it fits


def is_preflight(logs: Mapping[str, Any]) -> bool:
    """Tell whether logs or metrics are those of the evaluation before step 1."""
    return any(name.startswith(PREFLIGHT) for name in logs)


class ProgressBar(TrainerCallback):
    """Shows one bar with the newest losses on standard error; standard output stays free for results."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar at the step that the run continues from."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Advance the bar to the current step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the newest losses beside the bar."""
        if self._bar is not None and logs:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
            if shown:
                self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ShortRunLogging(TrainerCallback):
    """Lets a short run log so often that its curve has 20 points, or one for each step; a run of 200 steps logs as TRL's default says."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Choose the interval."""
        state.logging_steps = min(state.logging_steps, max(1, state.max_steps // _FEWEST_LINES))


class WholeCheckpoints(TrainerCallback):
    """Logs and evaluates before the checkpoint of the same step is saved, so that a run that continues from there lacks neither.

    The trainer evaluates at the end of an epoch after it has saved the checkpoint of the epoch's last step. A run that was killed
    between the two would go on without that evaluation, and with the random numbers of before it. A loss that is logged after a
    checkpoint would be the mean over the steps since then only, where the run was resumed.
    """

    def __init__(self) -> None:
        self._evaluated: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave out the evaluation before step 1 where a run goes on."""
        if state.global_step:
            args.eval_on_start = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Do what the trainer would do at the end of the epoch, and log where a checkpoint may be saved."""
        epoch = float(state.epoch or 0)
        ends = epoch.is_integer() or state.global_step >= state.max_steps
        if ends and args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= epoch:
            control.should_evaluate, self._evaluated = True, state.global_step
        best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        may_save = control.should_save or best or (ends and args.save_strategy == SaveStrategy.EPOCH)
        if args.logging_strategy != IntervalStrategy.NO:
            control.should_log |= may_save or (ends and args.logging_strategy == IntervalStrategy.EPOCH)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluate once."""
        if self._evaluated == state.global_step:
            control.should_evaluate = False


class MetricsWriter(TrainerCallback):
    """Appends every logged step to `metrics.jsonl`."""

    def __init__(self, run: Path) -> None:
        self._file = run / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the lines that a stopped run logged after the checkpoint that this one continues from, and write those that lack."""
        if state.is_world_process_zero:
            self._file.touch()
            remove_later_lines(self._file, state.global_step)
            if state.global_step:
                restore_lines(self._file, state.log_history)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line."""
        line = logs or {}
        if state.is_world_process_zero and _is_line(line):
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **line}) + "\n")


def restore_lines(file: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines that `metrics.jsonl` lacks, where it was removed or cut, from the history that a checkpoint keeps."""
    known: dict[int, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for text, content in read_lines(file):
        known[content["step"]].append((text, content))
    lines, restored = [], 0
    for entry in history:
        if not _is_line(entry):
            continue
        step = entry["step"]
        found = next((one for one in known[step] if _contains(one[1], entry)), None)
        if found is None:
            restored += 1
            lines.append((step, json.dumps({"step": step, **entry}) + "\n"))
        else:
            known[step].remove(found)
            lines.append((step, found[0]))
    if restored:
        lines += [(step, text) for step, others in known.items() for text, _ in others]
        write_text(file, "".join(text for _, text in sorted(lines, key=lambda line: line[0])))
        count = describe_count(restored, "line")
        logger.warning("%s: lacked %s, written again from the checkpoint's history", file, count)


def _is_line(logs: Mapping[str, Any]) -> bool:
    return not ("train_loss" in logs or is_preflight(logs))


def _contains(line: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    # Compared as text, where NaN equals NaN.
    return json.dumps({**line, **entry}, sort_keys=True) == json.dumps(line, sort_keys=True)


class EarlyStopping(EarlyStoppingCallback):
    """Stops a run when evaluations get no better; the evaluation before step 1, which only checks that it fits, does not count."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count on from the checkpoint that a run continues from."""
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        if state.global_step and isinstance(kept, dict):
            self.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **kwargs: object,
    ) -> None:
        """Count an evaluation."""
        if not is_preflight(metrics):
            super().on_evaluate(args, state, control, metrics, **kwargs)
