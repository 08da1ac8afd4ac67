"""Try before step 1 what makes training faster, and use it only where it is faster and computes the same.

`model.speed: auto` compiles the decoder layers with torch.compile. The first batch is run without and with them: loss and gradient
norm must agree within the rounding of the type that is computed in.
"""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.compat import count_tokens
from finetune.files.launcher import is_launched
from finetune.models.engine import find_engine
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import read_run_record
from finetune.training.preflight import draw_first_batch
from finetune.training.speed.compiled_layers import CompiledLayers, find_layers, find_missing_compiler, leave_as_before

logger = logging.getLogger(__name__)

# Compiling takes about a minute, so a shorter run is not made shorter.
WORTHWHILE_SECONDS = 600
_TIMED = 3
# A compiled layer rounds its sums in another order. The mean over many tokens moves by less than one unit of a 16-bit type, and in
# float32 by less than 1e-4; the gradient norm, which passes all layers twice, by some times as much.
_SMALLEST_LIMIT, _NORM_FACTOR = 1e-4, 4
# What is gained must be more than what the clock of a busy machine gains and loses.
_FASTER = 0.97


@dataclass(frozen=True)
class SpeedChoice:
    """What was decided, and why; it is kept in the record of the run, so that a resumed run computes the same."""

    compiled: bool
    reason: str


@dataclass(frozen=True)
class Pass:
    """Loss and gradient norm of a batch, the seconds of its first run, and the median of the next ones."""

    loss: float
    norm: float
    first_seconds: float
    seconds: float


@contextlib.contextmanager
def try_speed(
    trainer: Trainer,
    resolved: ResolvedRecipe,
    decided: Callable[[SpeedChoice], None],
    earlier: SpeedChoice | None,
) -> Iterator[None]:
    """Let a trainer that trains inside the block try what `model.speed` says, and leave its layers as they were.

    `decided` is given the choice. `earlier` is what the run chose when it began: a resumed run does the same without a trial.
    """
    layers = find_layers(trainer.model)
    if resolved.recipe.model.speed == "auto":
        trainer.add_callback(_SpeedTrial(trainer, resolved, layers, decided, earlier))
    with leave_as_before(layers):
        yield


class _SpeedTrial(TrainerCallback):
    """Chooses before step 1, when the trainer has wrapped the model."""

    def __init__(
        self,
        trainer: Trainer,
        resolved: ResolvedRecipe,
        layers: CompiledLayers,
        decided: Callable[[SpeedChoice], None],
        earlier: SpeedChoice | None,
    ) -> None:
        self._trainer, self._resolved, self._layers = trainer, resolved, layers
        self._decided, self._earlier = decided, earlier

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Choose, say what was chosen, and switch it on."""
        choice = self._earlier or self._choose(state.max_steps * args.gradient_accumulation_steps)
        if choice.compiled and not self._layers.are_on:
            self._layers.switch_on()
        elif not choice.compiled:
            self._layers.switch_off()
        logger.info("model.speed: layers %scompiled: %s", "" if choice.compiled else "not ", choice.reason)
        self._decided(choice)

    def _choose(self, batches: int) -> SpeedChoice:
        """Return the choice; the layers stay on where they were compiled last."""
        if (obstacle := find_obstacle(self._resolved, self._trainer.args.device)) is not None:
            return SpeedChoice(False, obstacle)
        batch = draw_first_batch(self._trainer)
        before = self._run(batch)
        if (whole := before.seconds * batches) < WORTHWHILE_SECONDS:
            minutes = f"{max(1, round(whole / 60))} min"
            return SpeedChoice(
                False, f"the run takes about {minutes}, and compiling pays from {WORTHWHILE_SECONDS // 60} min on"
            )
        self._layers.switch_on()
        try:
            after = self._run(batch)
        except torch.OutOfMemoryError:
            return SpeedChoice(False, "memory ran out with compiled layers")
        finally:
            self._trainer.model.zero_grad(set_to_none=True)
        return compare_passes(before, after, torch.finfo(_find_computed_type(self._trainer)).eps)

    def _run(self, batch: Mapping[str, Any]) -> Pass:
        """Run a batch forward and backward several times; random numbers, gradients and counts are as before afterwards."""
        trainer, device = self._trainer, self._trainer.args.device
        metrics, tokens = copy.deepcopy(vars(trainer).get("_metrics")), count_tokens(trainer)
        seconds, loss, norm = [], 0.0, 0.0
        trainer.model_wrapped.train()
        for _ in range(1 + _TIMED):
            trainer.model.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                _wait(device)
                started = time.perf_counter()
                with trainer.compute_loss_context_manager():
                    found = trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(dict(batch)))
                found.backward()
                _wait(device)
                seconds.append(time.perf_counter() - started)
            loss, norm = float(found.detach()), _measure_norm(trainer.model)
        trainer.model.zero_grad(set_to_none=True)
        if metrics is not None:
            trainer._metrics = metrics
        count_tokens(trainer, tokens)
        return Pass(loss, norm, seconds[0], median(seconds[1:]))


def _measure_norm(model: torch.nn.Module) -> float:
    """Return the norm of all gradients together, in float32."""
    gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_obstacle(resolved: ResolvedRecipe, device: torch.device) -> str | None:
    """Return why layers cannot be compiled in this run, or None."""
    if find_engine() != "one" or is_launched():
        return "several processes share the run"
    if resolved.method.is_online:
        return "the method generates answers while it trains"
    return find_missing_compiler(device)


def compare_passes(before: Pass, after: Pass, unit: float) -> SpeedChoice:
    """Choose compiled layers where they are faster and their loss and gradient norm are those of `before` within rounding.

    `unit` is the distance between 1 and the next number of the type that is computed in.
    """
    figures = (
        f"{after.seconds:.3f} s a batch in place of {before.seconds:.3f} s; loss {after.loss:.4f} and {before.loss:.4f}, gradient norm "
        f"{after.norm:.4f} and {before.norm:.4f}; compiling took {after.first_seconds:.0f} s"
    )
    limit = max(unit, _SMALLEST_LIMIT)
    is_same = math.isclose(before.loss, after.loss, rel_tol=limit)
    if not is_same or not math.isclose(before.norm, after.norm, rel_tol=_NORM_FACTOR * limit):
        return SpeedChoice(False, f"they compute something else, which is a fault of torch.compile: {figures}")
    if after.seconds > _FASTER * before.seconds:
        return SpeedChoice(False, f"they are not faster: {figures}")
    return SpeedChoice(True, figures)


def read_choice(run: Path) -> SpeedChoice:
    """Return what a run chose when it began, as its record says; a run without a choice has no compiled layers."""
    found = read_run_record(run).get("speed")
    return SpeedChoice(**found) if isinstance(found, dict) else SpeedChoice(False, "the run began without them")


def _find_computed_type(trainer: Trainer) -> torch.dtype:
    """Return the type that matrix products are computed in."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    return torch.float32
