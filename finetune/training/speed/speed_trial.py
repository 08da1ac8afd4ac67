"""Try before step 1 what makes training faster, and use it only where it is faster and computes the same.

`model.speed: auto` knows two ways. Compiled layers (torch.compile) are tried in long runs: loss and gradient norm of the first batch
must agree within the rounding of the type that is computed in. Otherwise, 16-bit copies of the adapter's matrices: the same bits.
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
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.compat import count_tokens
from finetune.files.launcher import is_launched
from finetune.models.engine import find_engine
from finetune.models.streaming.from_main_memory import list_layers
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import read_run_record
from finetune.training.preflight import draw_first_batch
from finetune.training.speed.adapter_copies import AdapterCopies, list_lora_matrices
from finetune.training.speed.compiled_layers import CompiledLayers, find_missing_compiler

logger = logging.getLogger(__name__)

Way = Literal["none", "compiled layers", "adapter copies"]

# Compiling takes about a minute, so a shorter run is not made shorter.
WORTHWHILE_SECONDS = 600
_TIMED = 3
# A compiled layer rounds its sums in another order. The mean over many tokens moves by less than one unit of a 16-bit type, and in
# float32 by less than 1e-4; the gradient norm, which passes all layers twice, by some times as much.
_SMALLEST_LIMIT, _NORM_FACTOR = 1e-4, 4
# What is gained must be more than what the clock of a busy machine gains and loses; copies cost nothing, and may be as fast.
_FASTER: Mapping[Way, float] = {"compiled layers": 0.97, "adapter copies": 1.05}


@dataclass(frozen=True)
class SpeedChoice:
    """What was decided, and why; it is kept in the record of the run, so that a resumed run computes the same."""

    way: Way
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
    """Let a trainer that trains inside the block try what `model.speed` says, and leave its model as it was.

    `decided` is given the choice. `earlier` is what the run chose when it began: a resumed run does the same without a trial.
    """
    if resolved.recipe.model.speed != "auto":
        yield
        return
    trial = _SpeedTrial(trainer, resolved, decided, earlier)
    trainer.add_callback(trial)
    try:
        yield
    finally:
        trial.switch_off()


class _SpeedTrial(TrainerCallback):
    """Chooses before step 1, when the trainer has wrapped the model."""

    def __init__(
        self,
        trainer: Trainer,
        resolved: ResolvedRecipe,
        decided: Callable[[SpeedChoice], None],
        earlier: SpeedChoice | None,
    ) -> None:
        self._trainer, self._resolved = trainer, resolved
        self._decided, self._earlier = decided, earlier
        self._type = _find_computed_type(trainer)
        self._layers = CompiledLayers(list_layers(trainer.model))
        self._copies = AdapterCopies(list_lora_matrices(trainer.model), self._type)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Choose, say what was chosen, and switch it on."""
        choice = self._earlier or self._choose(state.max_steps * args.gradient_accumulation_steps)
        self._switch_on(choice.way)
        logger.info("model.speed: %s: %s", choice.way, choice.reason)
        self._decided(choice)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let copies follow the optimizer."""
        self._copies.refresh()

    def _switch_on(self, way: Way) -> None:
        if way == "compiled layers":
            self._layers.switch_on()
        elif way == "adapter copies":
            self._copies.switch_on(self._trainer)

    def switch_off(self) -> None:
        """Leave the model as it was."""
        self._layers.switch_off()
        self._copies.switch_off()

    def _choose(self, batches: int) -> SpeedChoice:
        if (obstacle := find_obstacle(self._resolved)) is not None:
            return SpeedChoice("none", obstacle)
        batch = draw_first_batch(self._trainer)
        before = self._run(batch)
        compiled = find_missing_compiler(self._trainer.args.device) or _find_shortness(before.seconds * batches)
        if compiled is None:
            choice = self._try("compiled layers", before, batch, max(torch.finfo(self._type).eps, _SMALLEST_LIMIT))
            if choice.way != "none":
                return choice
            compiled = choice.reason
        if self._type == torch.float32 or not self._copies.matrices:
            return SpeedChoice("none", compiled)
        choice = self._try("adapter copies", before, batch, 0.0)
        return SpeedChoice(choice.way, f"{choice.reason} (no compiled layers: {compiled})")

    def _try(self, way: Way, before: Pass, batch: Mapping[str, Any], limit: float) -> SpeedChoice:
        """Return a way where it is faster and its figures are those of `before` within a limit, else `none`."""
        self._switch_on(way)
        try:
            return compare_passes(way, before, self._run(batch), limit)
        except torch.OutOfMemoryError:
            return SpeedChoice("none", f"memory ran out with {way}")
        finally:
            self.switch_off()

    def _run(self, batch: Mapping[str, Any]) -> Pass:
        """Run a batch forward and backward several times; random numbers, gradients and counts are as before afterwards."""
        trainer, device = self._trainer, self._trainer.args.device
        metrics, tokens = vars(trainer).get("_metrics", {}), count_tokens(trainer)  # TRL counts in compute_loss
        kept = copy.deepcopy(metrics)
        seconds, loss, norm = [], 0.0, 0.0
        trainer.model_wrapped.train()
        try:
            for _ in range(1 + _TIMED):
                trainer.model.zero_grad(set_to_none=True)
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    _wait(device)
                    started = time.perf_counter()
                    with trainer.compute_loss_context_manager():
                        found = trainer.compute_loss(trainer.model_wrapped, dict(batch))
                    found.backward()
                    self._copies.bring_gradients()
                    _wait(device)
                    seconds.append(time.perf_counter() - started)
                loss, norm = float(found.detach()), _measure_norm(trainer.model)
        finally:
            trainer.model.zero_grad(set_to_none=True)
            metrics.update(kept)
            count_tokens(trainer, tokens)
        return Pass(loss, norm, seconds[0], median(seconds[1:]))


def _measure_norm(model: torch.nn.Module) -> float:
    """Return the norm of all gradients together, in float32."""
    gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_obstacle(resolved: ResolvedRecipe) -> str | None:
    """Return why nothing can be tried in this run, or None."""
    if find_engine() != "one" or is_launched():
        return "several processes share the run"
    return "the method generates answers while it trains" if resolved.method.is_online else None


def _find_shortness(seconds: float) -> str | None:
    """Return that a run is too short to be compiled, or None."""
    if seconds >= WORTHWHILE_SECONDS:
        return None
    minutes = f"{max(1, round(seconds / 60))} min"
    return f"the run takes about {minutes}, and compiling pays from {WORTHWHILE_SECONDS // 60} min on"


def compare_passes(way: Way, before: Pass, after: Pass, limit: float) -> SpeedChoice:
    """Choose a way where it is faster, and loss and gradient norm are those of `before` within a relative limit (0: the same bits)."""
    figures = (
        f"{after.seconds:.3f} s a batch in place of {before.seconds:.3f} s; loss {after.loss:.4f} and {before.loss:.4f}, gradient norm "
        f"{after.norm:.4f} and {before.norm:.4f}; the first batch took {after.first_seconds:.0f} s"
    )
    is_same = math.isclose(before.loss, after.loss, rel_tol=limit)
    if not is_same or not math.isclose(before.norm, after.norm, rel_tol=_NORM_FACTOR * limit):
        return SpeedChoice("none", f"{way} compute something else, which is a fault: {figures}")
    if after.seconds > _FASTER[way] * before.seconds:
        return SpeedChoice("none", f"{way} are not faster: {figures}")
    return SpeedChoice(way, figures)


def read_choice(run: Path) -> SpeedChoice:
    """Return what a run chose when it began, as its record says; a run without a choice goes on as it was."""
    found = read_run_record(run).get("speed")
    return SpeedChoice(**found) if isinstance(found, dict) else SpeedChoice("none", "the run began without")


def _find_computed_type(trainer: Trainer) -> torch.dtype:
    """Return the type that matrix products are computed in."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    return torch.float32
