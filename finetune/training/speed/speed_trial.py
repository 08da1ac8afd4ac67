"""Try before step 1 what makes training faster, and use it only where it is faster and computes the same.

`model.speed: auto` tries the ways of a table one after another, each on top of those that were chosen before it. A way is used where
loss and gradient norm of the first batch agree within the rounding of the type that is computed in, and time is saved.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.compat import replace_attribute
from finetune.files.launcher import is_launched
from finetune.models.engine import find_engine
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import SpeedChoice
from finetune.training.preflight import draw_first_batch
from finetune.training.speed.passes import Pass, Verdict, compare_passes, run_passes
from finetune.training.speed.ways import WAYS, Way

logger = logging.getLogger(__name__)

# Compiling takes about a minute, so a shorter run is not made shorter.
WORTHWHILE_SECONDS = 600


@contextlib.contextmanager
def try_speed(
    trainer: Trainer,
    resolved: ResolvedRecipe,
    decided: Callable[[SpeedChoice], None],
    earlier: SpeedChoice | None,
    shared: frozenset[str] | None = None,
) -> Iterator[None]:
    """Let a trainer that trains inside the block try what `model.speed` says, and leave its model as it was.

    `decided` is given the choice. `earlier` is what the run chose when it began: a resumed run does the same without a trial.
    `shared` are the ways of the runs which it is compared with: the clock decides nothing, and each of them that computes the same is used.
    """
    if resolved.recipe.model.speed != "auto":
        yield
        return
    trial = _SpeedTrial(trainer, resolved, decided, earlier, shared)
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
        shared: frozenset[str] | None,
    ) -> None:
        self._trainer, self._resolved = trainer, resolved
        self._decided, self._earlier, self._shared = decided, earlier, shared
        self._type = _find_computed_type(trainer)
        self._switches = {name: way.make(trainer, resolved, self._type) for name, way in WAYS.items()}
        self._step = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Choose, say what was chosen, and switch it on."""
        choice = self._earlier or self._choose(state.max_steps * args.gradient_accumulation_steps)
        if choice.ways:
            self._switch_on(choice.ways)
            self._step.enter_context(replace_attribute(self._trainer, "training_step", self._wrap_step()))
        logger.info("model.speed: %s", choice.describe())
        if state.is_world_process_zero:  # the others would write the same file at the same time
            self._decided(choice)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let what is on follow the optimizer."""
        for switch in self._switches.values():
            switch.follow_optimizer()

    def _wrap_step(self) -> Callable[..., Any]:
        step = self._trainer.training_step

        def run(*arguments: Any, **options: Any) -> Any:
            with self._around_batch():
                return step(*arguments, **options)

        return run

    @contextlib.contextmanager
    def _around_batch(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for switch in self._switches.values():
                stack.enter_context(switch.around_batch())
            yield

    def _switch_on(self, names: Sequence[str]) -> None:
        for name in names:
            self._switches[name].switch_on()

    def _switch_all_off(self) -> None:
        for switch in self._switches.values():
            switch.switch_off()

    def switch_off(self) -> None:
        """Leave trainer and model as they were."""
        self._step.close()
        self._switch_all_off()

    def _choose(self, batches: int) -> SpeedChoice:
        if (obstacle := find_run_obstacle(self._resolved)) is not None:
            return SpeedChoice((), obstacle)
        reasons = {name: self._find_way_obstacle(name, way) for name, way in WAYS.items()}
        if all(reasons.values()):
            return SpeedChoice((), _join(reasons))
        batch, chosen = draw_first_batch(self._trainer), list[str]()
        plain = best = run_passes(self._trainer, batch, self._around_batch)
        for name, way in WAYS.items():
            if any(other in chosen for other in way.without):
                del reasons[name]
                continue
            if way.needs_long_run and self._shared is None:
                reasons[name] = reasons[name] or _find_shortness(best.seconds * batches)
            if reasons[name] is None:
                verdict, best = self._try([*chosen, name], plain, best, batch)
                reasons[name] = verdict.reason
                chosen += [name] if verdict.is_used else []
        return SpeedChoice(tuple(chosen), _join(reasons))

    def _find_way_obstacle(self, name: str, way: Way) -> str | None:
        own = way.find_missing(self._trainer.args.device) or self._switches[name].find_obstacle()
        if own is None and self._shared is not None and name not in self._shared:
            return "the runs that this one is compared with do without"
        return own

    def _try(self, names: Sequence[str], plain: Pass, best: Pass, batch: Mapping[str, Any]) -> tuple[Verdict, Pass]:
        """Return whether the last of these ways is used on top of the others, and the best pass after that."""
        try:
            self._switch_on(names)
            after = run_passes(self._trainer, batch, self._around_batch)
        except torch.OutOfMemoryError:
            return Verdict(False, "memory ran out"), best
        # What a library raises of a card, a type or a shape that its kernels do not know; the run does without them.
        except Exception as error:
            logger.debug("model.speed: %s cannot be used", names[-1], exc_info=True)
            first_line = next(iter(str(error).strip().splitlines()), "")
            return Verdict(False, f"cannot be used here: {type(error).__name__}: {first_line}"), best
        finally:
            self._switch_all_off()
        rounding = next((WAYS[name].rounds_to for name in names if WAYS[name].rounds_to), None) or self._type
        way = WAYS[names[-1]] if self._shared is None else replace(WAYS[names[-1]], faster=math.inf)
        verdict = compare_passes(way, plain, best, after, rounding)
        return verdict, after if verdict.is_used else best


def find_run_obstacle(resolved: ResolvedRecipe) -> str | None:
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


def _join(reasons: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _find_computed_type(trainer: Trainer) -> torch.dtype:
    """Return the type that matrix products are computed in."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    return torch.float32
