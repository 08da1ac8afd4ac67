"""Run a trainer's steps under a tracker, telling it which stage of a step runs: forward, loss, backward, recomputation, step."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.compat import wrap_backward
from finetune.models.reference_model import REFERENCE
from finetune.planning.step import tracker as stage
from finetune.planning.step.tracker import MemoryTracker

ADAPTER, FROZEN_ADAPTER, GRADIENTS, OPTIMIZER = "adapter", "adapter: frozen copy", "gradients", "optimizer"
KEPT, RECOMPUTED, LOSS, WORKSPACE = "activations kept", "activations recomputed", "logits and loss", "workspace"
TABLES, SMALL, SCALES = "weights: tables", "weights: norms and biases", "weights: 4-bit scales"
_TYPE_NAMES = {
    torch.uint8: "nf4",
    torch.int8: "int8",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
LINEAR = {dtype: f"weights: linear layers, {name}" for dtype, name in _TYPE_NAMES.items()}
WEIGHTS = frozenset((TABLES, SMALL, SCALES, *LINEAR.values()))
# Smaller states stay on the device. Source: get_state_buffer in bitsandbytes/optim/optimizer.py of 0.50.
_FEWEST_PAGED = 100_000


def follow_training(trainer: Trainer, tracker: MemoryTracker, prepare: Callable[[Trainer], None] | None = None) -> None:
    """Train as the trainer's options say, with every storage followed and counted for its part.

    `prepare` runs unfollowed when the trainer is ready for its first step.
    """

    def begin() -> None:
        if prepare is not None:
            with tracker.pause():
                prepare(trainer)
        for part, tensor in list_weights(trainer.model):
            tracker.adopt(tensor, part)
        for tensor in (*list_states(optimizer), *_list_copies(trainer.model, optimizer)):
            tracker.adopt(tensor, OPTIMIZER)
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                tracker.adopt(parameter.grad, GRADIENTS)

    optimizer = trainer.create_optimizer()
    trainer.add_callback(_Beginning(begin))
    with contextlib.ExitStack() as stack:
        _watch_backbone(trainer.model, tracker, stack)
        _watch_backward(trainer, tracker, stack)
        _watch_optimizer(optimizer, tracker, stack)
        stack.enter_context(tracker)
        trainer.train()
    tracker.adopt_stage(stage.LOSS, LOSS)
    tracker.adopt_stage(stage.AGAIN, RECOMPUTED)


class _Beginning(TrainerCallback):
    """Call a function once the trainer is ready for its first step."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Call the function."""
        self._begin()


def make_optimizer_states(trainer: Trainer, keep_gradients: bool) -> None:
    """Take an optimizer step on gradients without content, so that the next step finds what a run's later steps find."""
    optimizer = trainer.optimizer.optimizer  # accelerate's wrapper would skip a step that it did not prepare
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # Where an optimizer steps float32 copies, gradients are float32 too.
            dtype = parameter.dtype if id(parameter) in stepped else torch.float32
            parameter.grad = torch.zeros_like(parameter, dtype=dtype)
    optimizer.step()
    if not keep_gradients:
        for parameter in trainer.model.parameters():
            parameter.grad = None


def list_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that a model holds before its first step, with its part: tables, linear layers, norms, adapter."""
    adapts = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if adapts and parameter.requires_grad:
            yield ADAPTER, parameter
        elif adapts and REFERENCE in name.split("."):
            yield FROZEN_ADAPTER, parameter
        elif "embed_tokens" in name or "lm_head" in name:
            yield TABLES, parameter
        elif parameter.ndim < 2:
            yield SMALL, parameter
        else:
            yield LINEAR.get(parameter.dtype, LINEAR[torch.float32]), parameter
            yield from ((SCALES, tensor) for tensor in _list_scales(parameter))
    yield from ((SMALL, buffer) for buffer in model.buffers())


def list_states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the tensors that an optimizer keeps in the device's memory; paged ones lie in the host's and visit."""
    is_paged = isinstance(optimizer, Optimizer8bit) and optimizer.is_paged
    for state in optimizer.state.values():
        for name, value in state.items():
            pages = is_paged and name in ("state1", "state2") and value.numel() >= _FEWEST_PAGED
            if isinstance(value, torch.Tensor) and not pages:
                yield value


def _list_copies(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield what an optimizer steps that is not the model's own: float32 copies of weights that are held in less."""
    own = {id(parameter) for parameter in model.parameters()}
    yield from (p for group in optimizer.param_groups for p in group["params"] if id(p) not in own)


def _list_scales(parameter: Any) -> Iterator[torch.Tensor]:
    """Yield what bitsandbytes keeps beside a 4-bit weight: block scales, themselves in 8 bits, and their own."""
    if parameter.dtype != torch.uint8:
        return
    state = parameter.quant_state
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def _watch_backbone(model: torch.nn.Module, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    """Tell the layers from the loss, which is all that follows them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone: Any = base.base_model

    def start_backward(gradient: torch.Tensor) -> None:
        tracker.stage = stage.BACKWARD

    def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tracker.stage = stage.LOSS
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(start_backward)

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        tracker.stage = stage.FORWARD

    handles = [backbone.register_forward_pre_hook(enter), backbone.register_forward_hook(leave)]
    for handle in handles:
        stack.callback(handle.remove)


def _watch_backward(trainer: Trainer, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    """Count what the forward pass left behind as kept, and every gradient as such once its parameter has it."""

    def wrap(run_backward: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run_backward)
        def backward(loss: torch.Tensor, **options: Any) -> None:
            tracker.adopt_live(stage.FORWARD, KEPT)
            run_backward(loss, **options)
            tracker.stage = stage.STEP

        return backward

    def count_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            tracker.adopt(parameter.grad, GRADIENTS)

    stack.enter_context(wrap_backward(trainer, wrap))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            handle = parameter.register_post_accumulate_grad_hook(count_gradient)
            stack.callback(handle.remove)


def _watch_optimizer(optimizer: torch.optim.Optimizer, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    def count_states(optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        for tensor in list_states(optimizer):
            tracker.adopt(tensor, OPTIMIZER)

    stack.callback(optimizer.register_step_post_hook(count_states).remove)
