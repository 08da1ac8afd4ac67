"""Compile the decoder layers of a model with torch.compile, and make them as they were again."""

import contextlib
import importlib.util
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune.training.speed.switch import Switch, replace_in_training

# The same random numbers as without compiling, and no choice between kernels by their measured time, which may differ on a resumed run.
COMPILER: dict[str, Any] = {
    "backend": "inductor",
    "dynamic": True,  # lengths differ from batch to batch, so the code is made for any
    "options": {"fallback_random": True, "deterministic": True},
}


class CompiledLayers(Switch):
    """The decoder layers of a model; while they are on, those that train run compiled.

    All layers have one shape, so that the code of the first is the code of all. Evaluation and generation stay uncompiled: their
    figures are those of `finetune evaluate`, and no time goes into kernels for every length.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._layers = layers

    def change(self, undo: contextlib.ExitStack) -> None:
        """Let the layers run compiled; their code is made when they first run."""
        for layer in self._layers:
            replace_in_training(undo, layer, torch.compile(layer.forward, **COMPILER), layer.forward)


def find_missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine, or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler is installed (g++ or clang++)"
    if device.type not in ("cuda", "cpu"):
        return f"torch.compile is not used on a {device.type} device"
    return None
