"""Train on a base whose layers stay in main memory: only two of them have their matrices on the device at a time.

A frozen layer needs its matrices only while its forward or its backward pass runs. The device has two slots, each as large as the
matrices of one layer. Layer k always uses slot k % 2: its parameters are views into that slot for good, and only the bytes in it
change. So every tensor that a library keeps for the backward pass points to the right memory, whatever it kept. While one layer
computes, the next one is copied, on a stream of its own.

Scales, norms, biases, token tables and the adapter stay on the device. The same kernels read the same bytes, so losses and
adapters have the bits of a run without streaming.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SLOTS = 2
# Kernels read matrices in blocks of up to 16 bytes; torch's own allocations on a GPU begin at multiples of 512.
_ALIGNMENT = 512


@dataclass(frozen=True)
class Matrix:
    """The frozen weight of a linear layer; `name` is its path within the decoder layer, `start` its first byte in a slot."""

    name: str
    module: nn.Linear
    start: int

    @property
    def bytes(self) -> int:
        """The size of the weight as it is held: packed where it is quantized."""
        return self.module.weight.numel() * self.module.weight.element_size()

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the weight's bytes in a buffer of the size of a slot, in the weight's dtype and shape."""
        weight = self.module.weight
        return buffer[self.start : self.start + self.bytes].view(weight.dtype).view(weight.shape)

    def place(self, buffer: torch.Tensor) -> None:
        """Let the weight be a view into a buffer from now on; its old memory is free."""
        weight: Any = self.module.weight
        weight.data = self.view(
            buffer
        )  # unlike a view made by an operation, it does not count as changed with the buffer
        if isinstance(
            self.module, Linear8bitLt
        ):  # bitsandbytes keeps the same bytes under a second name, at first in the weight
            holder: Any = self.module.state if weight.CB is None else weight
            holder.CB = weight.data


def list_layers(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """Return the decoder layers of a model, with or without an adapter."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(base.model.layers)


def list_matrices(layer: nn.Module) -> list[Matrix]:
    """Return the frozen matrices of the base in a decoder layer, with their places in a slot; an adapter's are left out."""
    matrices, start = [], 0
    for path, module in layer.named_modules():
        is_of_adapter = any(part.startswith("lora_") for part in path.split("."))
        if isinstance(module, nn.Linear) and not is_of_adapter and not module.weight.requires_grad:
            matrix = Matrix(f"{path}.weight", module, start)
            matrices.append(matrix)
            start += -(-matrix.bytes // _ALIGNMENT) * _ALIGNMENT
    return matrices


def count_bytes(matrices: Sequence[Matrix]) -> int:
    """Return how many bytes of a slot the matrices of a layer take."""
    return matrices[-1].start + matrices[-1].bytes if matrices else 0


def make_slots(layers: Sequence[Sequence[Matrix]], device: torch.device) -> list[torch.Tensor]:
    """Return the buffers on the device that all layers share; a model of one layer needs only one."""
    size = max(map(count_bytes, layers))
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(_SLOTS, len(layers)))]


def stream_layers(model: PreTrainedModel | PeftModel, device: torch.device) -> "LayerStream":
    """Move a model to the device, except for the frozen matrices of its layers, which move to main memory and are streamed.

    The adapter must be attached already: some adapters begin with parts of the base's matrices.
    """
    stream = LayerStream(list_layers(model), device)
    model.to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the room of the layers, which the allocator would keep for itself
        logger.info(
            "the layers of the base stay in main memory, %.2f GB; the GPU holds two at a time", stream.host.nbytes / 1e9
        )
    else:
        logger.warning(
            "model.stream_layers: saves nothing without an NVIDIA GPU, since the layers are in main memory anyway"
        )
    return stream


class LayerStream:
    """The matrices of all layers in main memory, and the slots on the device that hold two of them."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        """Move the matrices to main memory, a layer at a time, and let every layer's passes bring them back."""
        matrices = [list_matrices(layer) for layer in layers]
        sizes = [count_bytes(layer) for layer in matrices]
        is_gpu = device.type == "cuda"
        # One block: torch rounds each block of pinned memory up to a power of two.
        self.host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=is_gpu)
        self._copies = self.host.split(sizes)
        self.slots = make_slots(matrices, device)
        self._held: list[int | None] = [None] * len(self.slots)
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._copied = [torch.cuda.Event() for _ in self.slots] if is_gpu else []
        for number, (layer, copy) in enumerate(zip(layers, self._copies, strict=True)):
            for matrix in matrices[number]:
                matrix.view(copy).copy_(matrix.module.weight.detach())
                matrix.place(self.slots[number % _SLOTS])
            self._follow(number, layer, matrices[number])

    def _follow(self, number: int, layer: nn.Module, matrices: Sequence[Matrix]) -> None:
        """Bring a layer's matrices before each of its passes; `state_dict` gets them from main memory.

        The hooks are outside gradient checkpointing, which computes a layer once more within its backward pass.
        """

        def begin_forward(*_: object) -> None:
            # Without gradients a new pass follows, of an evaluation or for the next token.
            following = number + 1 if torch.is_grad_enabled() else (number + 1) % len(self._copies)
            self._bring(number, following)

        def begin_backward(gradient: torch.Tensor) -> None:
            self._bring(number, number - 1)

        def watch_output(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(begin_backward)

        layer.register_forward_pre_hook(begin_forward)
        layer.register_forward_hook(watch_output)
        layer.register_state_dict_post_hook(partial(_give_whole, matrices, self._copies[number]))

    def _bring(self, number: int, following: int) -> None:
        """Make sure that a layer's slot holds it, and begin to copy the one that follows, if its slot is another one."""
        slot = number % _SLOTS
        self._copy(number)
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._copied[slot])
        if 0 <= following < len(self._copies) and following % _SLOTS != slot:
            self._copy(following)

    def _copy(self, number: int) -> None:
        """Copy a layer into its slot, unless it is there; work that was launched before still reads what the slot held."""
        slot, copy = number % _SLOTS, self._copies[number]
        if self._held[slot] == number:
            return
        self._held[slot] = number
        if self._stream is None:
            self.slots[slot][: len(copy)].copy_(copy)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.slots[slot][: len(copy)].copy_(copy, non_blocking=True)
            self._copied[slot].record()


def _give_whole(
    matrices: Sequence[Matrix], copy: torch.Tensor, layer: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    """Put a layer's own matrices into a state dict; its parameters show whichever layer is in the slot."""
    for matrix in matrices:
        state[prefix + matrix.name] = matrix.view(copy)
