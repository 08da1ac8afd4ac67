"""Run the first batch forward and backward, and compare what it gives and how long it takes with other ways to compute it."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import Trainer

from finetune.compat import count_tokens
from finetune.training.speed.ways import Way

_TIMED = 3
# What TRL's trainers collect in compute_loss until the next log; the second is that of ORPO and CPO (TRL 1.16).
_COUNTS = ("_metrics", "_stored_metrics")
# Kernels round their sums in another order. The mean over many tokens moves by less than one unit of a 16-bit type, and in float32
# by less than 1e-4; the gradient norm, which passes all layers twice, by some times as much.
_SMALLEST_LIMIT, _NORM_FACTOR = 1e-4, 4


@dataclass(frozen=True)
class Pass:
    """Loss and gradient norm of a batch, the seconds of its first run, and the median of the next ones.

    `spread` is the relative difference between the norms of the runs: some kernels of a GPU add in another order each time.
    """

    loss: float
    norm: float
    first_seconds: float
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Whether a way is used, and the figures that say why."""

    is_used: bool
    reason: str


def run_passes(
    trainer: Trainer, batch: Mapping[str, Any], around: Callable[[], contextlib.AbstractContextManager[None]]
) -> Pass:
    """Run a batch several times inside `around`; random numbers, gradients and counts are as before afterwards."""
    device = trainer.args.device
    counts = [vars(trainer)[name] for name in _COUNTS if name in vars(trainer)]
    kept, tokens = copy.deepcopy(counts), count_tokens(trainer)
    seconds, norms, loss = [], [], 0.0
    trainer.model_wrapped.train()
    try:
        for _ in range(1 + _TIMED):
            trainer.model.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                _wait(device)
                started = time.perf_counter()
                with around():
                    with trainer.compute_loss_context_manager():
                        found = trainer.compute_loss(trainer.model_wrapped, dict(batch))
                    found.backward()
                _wait(device)
                seconds.append(time.perf_counter() - started)
            loss = float(found.detach())
            norms.append(_measure_norm(trainer.model))
    finally:
        trainer.model.zero_grad(set_to_none=True)
        for count, before in zip(counts, kept, strict=True):
            count.clear()
            count.update(before)
        count_tokens(trainer, tokens)
    spread = (max(norms) - min(norms)) / norms[-1] if norms[-1] else 0.0
    return Pass(loss, norms[-1], seconds[0], median(seconds[1:]), spread)


def _measure_norm(model: torch.nn.Module) -> float:
    """Return the norm of all gradients together, in float32."""
    gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_passes(way: Way, plain: Pass, best: Pass, after: Pass, dtype: torch.dtype) -> Verdict:
    """Use a way where it is faster than the best so far, and loss and gradient norm are those of the plain pass.

    They may differ by the rounding of `dtype`. A way that gives the same bits is compared with the best so far, to which it is added,
    and its norm may differ by what the best so far differs from itself.
    """
    known, limit = (best, 0.0) if way.same_bits else (plain, max(torch.finfo(dtype).eps, _SMALLEST_LIMIT))
    figures = (
        f"{after.seconds:.3f} s a batch in place of {best.seconds:.3f} s; loss {after.loss:.4f} and {known.loss:.4f}, gradient norm "
        f"{after.norm:.4f} and {known.norm:.4f}; the first batch took {after.first_seconds:.0f} s"
    )
    is_same = math.isclose(known.loss, after.loss, rel_tol=limit)
    if not is_same or not math.isclose(known.norm, after.norm, rel_tol=_NORM_FACTOR * (limit + known.spread)):
        return Verdict(False, f"computes something else than rounding explains: {figures}")
    if after.seconds > way.faster * best.seconds:
        return Verdict(False, f"not faster: {figures}")
    return Verdict(True, figures)
