"""Compile the decoder layers of a model with torch.compile, and make them as they were again."""

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finetune.compat import replace_attribute

# The same random numbers as without compiling, and no choice between kernels by their measured time, which may differ on a resumed run.
COMPILER: dict[str, Any] = {
    "backend": "inductor",
    "dynamic": True,  # lengths differ from batch to batch, so the code is made for any
    "options": {"fallback_random": True, "deterministic": True},
}


@dataclass
class CompiledLayers:
    """The decoder layers of a model; while they are on, those that train run compiled.

    All layers have one shape, so that the code of the first is the code of all. Evaluation and generation stay uncompiled: their
    figures are those of `finetune evaluate`, and no time goes into kernels for every length.
    """

    layers: Sequence[nn.Module]
    _on: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def switch_on(self) -> None:
        """Let the layers run compiled; their code is made when they first run."""
        for layer in self.layers:
            self._on.enter_context(replace_attribute(layer, "forward", _run_compiled_in_training(layer, layer.forward)))

    def switch_off(self) -> None:
        """Let the layers run as they were."""
        self._on.close()


def _run_compiled_in_training(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, **COMPILER)

    def run(*arguments: Any, **values: Any) -> Any:
        return (compiled if layer.training else forward)(*arguments, **values)

    return run


def find_missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine, or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler is installed (g++ or clang++)"
    if device.type not in ("cuda", "cpu"):
        return f"torch.compile is not used on a {device.type} device"
    return None
