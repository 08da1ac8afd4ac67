"""Compute norms and gates of the decoder layers with Liger's fused kernels, where the package is installed.

The plain modules run an operation, and keep its result, for every product and rounding. A fused kernel reads its input once and
keeps less. Only what stands in modules of its own is replaced: the rotary embedding is a function of transformers' file that
evaluations call as well, and the kit computes the loss in tiles itself.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from finetune.training.speed.switch import Switch, replace_in_training

_PACKAGES = ("liger_kernel", "triton")
_LIGER = "liger_kernel.transformers.functional"


class Kernels(NamedTuple):
    """Liger's public functions of a norm and of SwiGLU."""

    norm: Callable[..., Any]
    gate: Callable[..., Any]


def load_kernels() -> Kernels:
    """Import the kernels, which takes seconds."""
    functions = importlib.import_module(_LIGER)
    return Kernels(functions.liger_rms_norm, functions.liger_swiglu)


class FusedKernels(Switch):
    """The norms and MLPs of the decoder layers; while they are on, those that train use the kernels."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._modules = [module for layer in layers for module in layer.modules() if type(module) in _MAKERS]

    def find_obstacle(self) -> str | None:
        """Return that the model has none of the modules, or None."""
        return None if self._modules else "the model has no modules for which there are kernels"

    def change(self, undo: contextlib.ExitStack) -> None:
        """Let the modules use the kernels."""
        kernels = load_kernels()
        for module in self._modules:
            replace_in_training(undo, module, _MAKERS[type(module)](module, kernels), module.forward)


def _fuse_norm(module: Any, kernels: Kernels) -> Callable[..., Any]:
    """Return a norm as Llama rounds: statistics in float32, the product with the weight in the type of the states."""

    def run(hidden_states: torch.Tensor) -> Any:
        # The kernel could write its gradient over its input's, which other code may still hold.
        return kernels.norm(
            hidden_states, module.weight, module.variance_epsilon, offset=0.0, casting_mode="llama", in_place=False
        )

    return run


def _fuse_gate(module: Any, kernels: Kernels) -> Callable[..., Any]:
    def run(x: torch.Tensor) -> Any:
        return module.down_proj(kernels.gate(module.gate_proj(x), module.up_proj(x)))

    return run


# By exact class: a subclass may compute something else.
_MAKERS: dict[type[nn.Module], Callable[[Any, Kernels], Callable[..., Any]]] = {
    LlamaRMSNorm: _fuse_norm,
    LlamaMLP: _fuse_gate,
}


def find_missing_kernels(device: torch.device) -> str | None:
    """Return what the kernels lack on this machine, or None."""
    if device.type != "cuda":
        return "Liger's kernels need an NVIDIA GPU"
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"the package {absent[0]} is not installed (pip install liger-kernel)" if absent else None
