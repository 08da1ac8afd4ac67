"""Run a trainer's steps under a tracker, telling it which stage of a step runs: forward, loss, backward, recomputation, step."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from finetune.plan.tracker import MemoryTracker

ADAPTER, GRADIENTS, OPTIMIZER = "adapter", "gradients", "optimizer"
KEPT, RECOMPUTED, LOSS, WORKSPACE = "activations kept", "activations recomputed", "logits and loss", "workspace"
TABLES, SMALL, SCALES = "weights: tables", "weights: norms and biases", "weights: 4-bit scales"
_FORWARD, _IN_LOSS, _BACKWARD, _AGAIN, _STEP = "forward", "loss", "backward", "recomputation", "optimizer step"


def follow_training(trainer: Trainer, tracker: MemoryTracker) -> None:
    """Train as the trainer's options say, with every storage followed and counted for its part."""
    for part, tensor in list_weights(trainer.model):
        tracker.adopt(tensor, part)
    trainer.create_optimizer()
    with contextlib.ExitStack() as stack:
        _watch_backbone(trainer.model, tracker, stack)
        _watch_backward(trainer, tracker, stack)
        _watch_optimizer(trainer.optimizer, tracker, stack)
        tracker.stage = _FORWARD
        stack.enter_context(tracker)
        trainer.train()
    tracker.adopt_stage(_IN_LOSS, LOSS)
    tracker.adopt_stage(_AGAIN, RECOMPUTED)


def list_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that a model holds before its first step, with its part: tables, linear layers, norms, adapter."""
    adapts = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if adapts and parameter.requires_grad:
            yield ADAPTER, parameter
        elif "embed_tokens" in name or "lm_head" in name:
            yield TABLES, parameter
        elif parameter.ndim < 2:
            yield SMALL, parameter
        else:
            yield f"weights: linear layers, {_name_type(parameter.dtype)}", parameter
            yield from ((SCALES, tensor) for tensor in _list_scales(parameter))
    yield from ((SMALL, buffer) for buffer in model.buffers())


def _name_type(dtype: torch.dtype) -> str:
    names = {torch.uint8: "nf4", torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, "fp32")


def _list_scales(parameter: Any) -> Iterator[torch.Tensor]:
    """Yield what bitsandbytes keeps beside a 4-bit weight: block scales, themselves in 8 bits, and their own."""
    if parameter.dtype != torch.uint8:
        return
    state = parameter.quant_state
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def _watch_backbone(model: torch.nn.Module, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    """Tell the layers from the loss, which is all that follows them, and the first run of a layer from its second."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = base.base_model

    def start_backward(gradient: torch.Tensor) -> None:
        tracker.stage = _BACKWARD

    def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tracker.stage = _IN_LOSS
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(start_backward)

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        tracker.stage = _FORWARD

    def enter_layer(module: torch.nn.Module, inputs: Any) -> None:
        if tracker.stage == _BACKWARD:
            tracker.stage = _AGAIN

    def leave_layer(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if tracker.stage == _AGAIN:
            tracker.stage = _BACKWARD

    handles = [backbone.register_forward_pre_hook(enter), backbone.register_forward_hook(leave)]
    for layer in backbone.layers:
        handles.append(layer.register_forward_pre_hook(enter_layer))
        # Recomputation ends by an exception as soon as all that backward needs is there.
        handles.append(layer.register_forward_hook(leave_layer, always_call=True))
    for handle in handles:
        stack.callback(handle.remove)


def _watch_backward(trainer: Trainer, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    """Count what the forward pass left behind as kept, and every gradient as such once its parameter has it."""
    run_backward = trainer.accelerator.backward

    @functools.wraps(run_backward)
    def backward(loss: torch.Tensor, **options: Any) -> None:
        tracker.adopt_live(_FORWARD, KEPT)
        run_backward(loss, **options)
        tracker.stage = _STEP

    def count_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            tracker.adopt(parameter.grad, GRADIENTS)

    trainer.accelerator.backward = backward
    stack.callback(setattr, trainer.accelerator, "backward", run_backward)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            handle = parameter.register_post_accumulate_grad_hook(count_gradient)
            stack.callback(handle.remove)


def _watch_optimizer(optimizer: torch.optim.Optimizer, tracker: MemoryTracker, stack: contextlib.ExitStack) -> None:
    def count_states(optimizer: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tracker.adopt(value, OPTIMIZER)

    stack.callback(optimizer.register_step_post_hook(count_states).remove)
