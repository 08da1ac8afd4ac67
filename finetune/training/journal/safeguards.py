"""Keep a run safe while it trains: stop at numbers that are none, seal checkpoints, and stop soon after a signal."""

import logging
import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.api_arguments import name_option
from finetune.compat import count_tokens, watch_numbers
from finetune.errors import TrainingError
from finetune.files.cache import hash_file
from finetune.files.json_files import read_json, write_json
from finetune.files.safety.manifests import find_damage, write_manifest
from finetune.runs.run_files import COUNTS_FILE, TRAINER_STATE_FILE, list_trainer_checkpoints, read_step
from finetune.runs.trainer_checkpoints import read_token_count, remove_checkpoint, remove_older_checkpoints
from finetune.yulan.tensors import list_weight_files

logger = logging.getLogger(__name__)

_ADVICE = "lower trainer.learning_rate, or set model.dtype: bfloat16 (float32 on a CPU) if it was float16"


def add_safeguards(trainer: Trainer) -> None:
    """Add the callbacks of this module to a trainer."""
    for callback in (FiniteNumbers(trainer), CheckpointSeal(trainer), SignalWatch()):
        trainer.add_callback(callback)


class FiniteNumbers(TrainerCallback):
    """Stops a run at the first loss or gradient norm that is NaN or infinite, before the optimizer's step uses it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        watch_numbers(trainer, self._see_loss, self._see_norm)

    def _see_loss(self, loss: torch.Tensor) -> torch.Tensor:
        self._losses.append(loss.detach())
        return loss

    def _see_norm(self, norm: Any) -> Any:
        self._norm = norm
        return norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Check the losses of the step's batches, and the norm of their gradients.

        Raises:
            TrainingError: one is NaN or infinite.
        """
        losses, norm = self._losses, self._norm
        self._losses, self._norm = [], None
        # The loss is computed from the gradients' weights, so a NaN in it tells more about the cause.
        loss = float(torch.stack(losses).sum()) if losses else 0.0
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {state.global_step + 1}: the training loss is {loss}; {_ADVICE}; {_describe_kept(args)}"
            )
        # float16 scales its loss until gradients overflow, and then skips the step.
        is_scaled = self._trainer.accelerator.scaler is not None
        if norm is not None and not is_scaled and not math.isfinite(norm := float(norm)):
            raise TrainingError(
                f"step {state.global_step + 1}: the gradient norm is {norm}; {_ADVICE}; {_describe_kept(args)}"
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Check the losses of an evaluation.

        Raises:
            TrainingError: one is NaN or infinite.
        """
        for name, value in (metrics or {}).items():
            if name.endswith("_loss") and not math.isfinite(value):
                raise TrainingError(f"step {state.global_step}: the loss on held-out rows is {value}; {_ADVICE}")


def _describe_kept(args: TrainingArguments) -> str:
    if list_trainer_checkpoints(Path(args.output_dir)):
        return "the checkpoints in the run directory are from before this step"
    return "the run has saved no checkpoint yet"


class BaseWatch(TrainerCallback):
    """Ends a run whose base weights were written over while it trained, before another checkpoint or the result is saved.

    On a CPU frozen weights are read from their file each time they are needed, so that the run would go on with others. A file that was
    removed, or replaced by another of its name, stays as it was for this process.
    """

    def __init__(self, base: Path) -> None:
        """Note the files of a base before they are read."""
        self._seen = {file: (file.stat(), hash_file(file)) for file in list_weight_files(base)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Check the files before the checkpoint is sealed.

        Raises:
            TrainingError: one was written over.
        """
        self._check()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Check the files before the result is written.

        Raises:
            TrainingError: one was written over.
        """
        self._check()

    def _check(self) -> None:
        for file, (before, digest) in self._seen.items():
            try:
                now = file.stat()
            except OSError:
                continue
            if now.st_ino != before.st_ino or (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
                continue
            if hash_file(file) != digest:
                raise TrainingError(
                    f"{file}: was written over while the run read it, so the steps since the last checkpoint may be those of other "
                    f"weights; restore it, and continue with {name_option('--resume')}"
                )
            self._seen[file] = (now, digest)


class CheckpointSeal(TrainerCallback):
    """Writes a manifest into every checkpoint when all its files are on the disk, and only then removes older checkpoints."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # The trainer would remove the checkpoints before while the new one has no manifest yet.
        self._limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove damaged checkpoints that are newer than the one that the run continues from, and count tokens on.

        Raises:
            TrainingError: the checkpoint with the best weights so far, which the run ends with, is gone or damaged.
        """
        run, step = Path(args.output_dir), state.global_step
        if not step:
            return
        if args.load_best_model_at_end:
            state.best_model_checkpoint = _find_best(run, step)
        count_tokens(self._trainer, read_token_count(run / f"checkpoint-{step}"))
        for checkpoint in list_trainer_checkpoints(run) if args.should_save else ():
            if read_step(checkpoint) > step:
                logger.warning("%s: removed, because it is damaged", checkpoint)
                remove_checkpoint(checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Seal the checkpoint that every process has written its part of.

        Raises:
            TrainingError: it holds weights that are NaN or infinite.
        """
        trained = (parameter.detach() for parameter in self._trainer.model.parameters() if parameter.requires_grad)
        if not all(bool(weights.isfinite().all()) for weights in trained):
            raise TrainingError(
                f"step {state.global_step}: weights have become NaN or infinite; {_ADVICE}; "
                "the checkpoints before this step are whole"
            )
        self._trainer.accelerator.wait_for_everyone()
        if args.should_save:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / COUNTS_FILE, {"num_tokens": count_tokens(self._trainer)})
            write_manifest(checkpoint)
            remove_older_checkpoints(Path(args.output_dir), self._limit, state.best_model_checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep only the best checkpoint where one is kept, as the trainer does."""
        best = state.best_model_checkpoint
        if args.should_save and args.load_best_model_at_end and best is not None and self._limit == 1:
            for checkpoint in list_trainer_checkpoints(Path(args.output_dir)):
                if checkpoint.name != Path(best).name:
                    remove_checkpoint(checkpoint)


def _find_best(run: Path, step: int) -> str | None:
    """Return the checkpoint with the best weights until a step. The trainer's state names it by the path that it had.

    Raises:
        TrainingError: it is gone or damaged. The trainer would end with its last weights, or with damaged ones.
    """
    named = read_json(run / f"checkpoint-{step}" / TRAINER_STATE_FILE)["best_model_checkpoint"]
    if named is None:
        return None
    best = run / Path(named).name
    if (damage := find_damage(best)) is not None:
        raise TrainingError(
            f"{best}: holds the best weights so far, with which the run may end, and is not whole ({damage}); restore it, or start "
            "again with another output"
        )
    return str(best)


class SignalWatch(TrainerCallback):
    """Ends a run at the next step where the exception of a signal was lost.

    The command line ends at SIGTERM by an exception. Python drops exceptions that are raised in a finalizer or in a callback of the
    garbage search, and the run would go on.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._stopped_by: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Note the signal before the command line's own function is called."""
        before = signal.getsignal(signal.SIGTERM)
        if not callable(before):  # a program that uses this kit ends at once
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._stopped_by = number
            before(number, frame)

        try:
            signal.signal(signal.SIGTERM, note)
        except ValueError:  # only the main thread may
            return
        self._before = before

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the process where a signal asked for it."""
        self._end_if_asked()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the process where a signal asked for it."""
        self._end_if_asked()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the process where a signal asked for it."""
        self._end_if_asked()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Give the signal back."""
        self._end_if_asked()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _end_if_asked(self) -> None:
        if self._stopped_by is not None:
            sys.exit(128 + self._stopped_by)
