"""Train under a memory tracker: tell it the phase of each step, and which part of the memory each tensor belongs to."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import is_flash_attn_2_available

from finetune.compat import wrap_backward
from finetune.models.reference_model import REFERENCE
from finetune.planning.step import tracker as phase
from finetune.planning.step.tracker import MemoryTracker
from finetune.runs.resolved_recipe import ResolvedRecipe

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
# bitsandbytes pages moments of at least so many elements only. Source: get_state_buffer in bitsandbytes/optim/optimizer.py of 0.50.
_FEWEST_PAGED = 100_000
# A copy of a number of the adapter and its gradient, in 16 bits each (`model.speed`).
_COPY_BYTES = 4


def follow_training(trainer: Trainer, tracker: MemoryTracker, prepare: Callable[[Trainer], None] | None = None) -> None:
    """Train as the trainer's options say, and let the tracker log every storage and its part.

    `prepare` runs when the trainer is ready for its first step; the tracker does not log what it does.
    """

    def count_held_tensors() -> None:
        if prepare is not None:
            with tracker.pause():
                prepare(trainer)
        for part, tensor in list_weights(trainer.model):
            tracker.adopt(tensor, part)
        for tensor in (*list_device_states(optimizer), *_list_copies(trainer.model, optimizer)):
            tracker.adopt(tensor, OPTIMIZER)
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                tracker.adopt(parameter.grad, GRADIENTS)

    optimizer = trainer.create_optimizer()
    trainer.add_callback(_AtTrainBegin(count_held_tensors))
    with contextlib.ExitStack() as stack:
        _watch_backbone(trainer.model, tracker, stack)
        _watch_backward(trainer, tracker, stack)
        _watch_optimizer(optimizer, tracker, stack)
        stack.enter_context(tracker)
        trainer.train()
    tracker.adopt_phase(phase.LOSS, LOSS)
    tracker.adopt_phase(phase.CHECKPOINTING, RECOMPUTED)


class _AtTrainBegin(TrainerCallback):
    """Call a function once the trainer is ready for its first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Call the function."""
        self._function()


def make_optimizer_states(trainer: Trainer, keep_gradients: bool) -> None:
    """Take one optimizer step on gradients of zeros, so that the next step begins with moments, as a run's later steps do."""
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
    """Yield every tensor of a model with the part it belongs to: tables, linear layers, norms, adapter."""
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


def list_device_states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the tensors of an optimizer's state that are in the device's memory; paged ones are in the host's."""
    is_paged = isinstance(optimizer, Optimizer8bit) and optimizer.is_paged
    for state in optimizer.state.values():
        for name, value in state.items():
            pages = is_paged and name in ("state1", "state2") and value.numel() >= _FEWEST_PAGED
            if isinstance(value, torch.Tensor) and not pages:
                yield value


def _list_copies(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the float32 copies of weights that an optimizer steps where the model holds them in fewer bits."""
    own = {id(parameter) for parameter in model.parameters()}
    yield from (p for group in optimizer.param_groups for p in group["params"] if id(p) not in own)


def _list_scales(parameter: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that bitsandbytes keeps beside a 4-bit weight: its block scales in 8 bits, and the scales of those."""
    if parameter.dtype != torch.uint8:
        return
    state = parameter.quant_state
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def _watch_backbone(model: torch.nn.Module, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    """Set the phase where the layers begin and end; what follows them is the loss."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone: Any = base.base_model

    def start_backward(gradient: torch.Tensor) -> None:
        tracker.phase = phase.BACKWARD

    def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tracker.phase = phase.LOSS
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(start_backward)

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        tracker.phase = phase.FORWARD

    handles = [backbone.register_forward_pre_hook(enter), backbone.register_forward_hook(leave)]
    for handle in handles:
        stack.callback(handle.remove)


def _watch_backward(trainer: Trainer, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    """Count what the forward pass leaves in memory as kept activations, and each gradient once its parameter has it."""

    def wrap(run_backward: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run_backward)
        def backward(loss: torch.Tensor, **options: Any) -> None:
            tracker.adopt_live(phase.FORWARD, KEPT)
            run_backward(loss, **options)
            tracker.phase = phase.STEP

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
    """Count the tensors of the optimizer's state after each of its steps."""

    def count_states(optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        for tensor in list_device_states(optimizer):
            tracker.adopt(tensor, OPTIMIZER)

    stack.callback(optimizer.register_step_post_hook(count_states).remove)


def count_copy_bytes(resolved: ResolvedRecipe, trained: int) -> int:
    """Return at most how many bytes copies of a recipe's adapter take, `trained` numbers in all; 0 where it has none."""
    recipe = resolved.recipe
    tries = recipe.model.speed == "auto" and not resolved.method.is_online
    return _COPY_BYTES * trained if tries and not resolved.trains_all_weights and not recipe.adapter.dora else 0


def may_use_flash(resolved: ResolvedRecipe) -> bool:
    """Tell whether a run trains with the package flash_attn, or tries it on this machine."""
    model = resolved.recipe.model
    tries = model.speed == "auto" and model.attention == "auto" and not resolved.method.is_online
    return model.attention == "flash_attention_2" or (tries and is_flash_attn_2_available())
