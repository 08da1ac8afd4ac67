"""Run a model whose matrices stay on the disk: those of a layer are read before it runs, and dropped after it.

The classes and the forward pass are those of transformers and PEFT, so the outputs have the same bits as those of the whole model. Only
the matrices of one layer, or one token table, are in memory at a time, in float32, beside all vectors and the adapter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.models.lora import apply_adapter, enlarge_tables
from finetune.yulan.llama_files import EMBEDDING, HEAD
from finetune.yulan.tensors import TensorFolder

# Called with a tensor's name and a float32 tensor to read it into.
ReadTensor = Callable[[str, torch.Tensor], None]
# PEFT puts a module into these, and keeps the base's tensors under their own names within them.
_WRAPPERS = frozenset(["base_layer", "original_module", "token_adapter"])
PART_ELEMENTS = 1 << 20  # of a matrix that is read, at most these at a time
_KEPT_ELEMENTS = 1 << 24  # of a matrix of a layer; the tables of tokens are larger


def read_stored(tensors: TensorFolder, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None) -> ReadTensor:
    """Return a function that reads a model's tensors from a checkpoint; a tied head is its embedding.

    `change` is given each tensor's name and some of its rows at a time, as stored, and returns them changed.
    """

    def read(name: str, target: torch.Tensor) -> None:
        stored_name = EMBEDDING if name == HEAD and HEAD not in tensors.entries else name
        if target.dim() < 2:
            whole = tensors.read(stored_name)
            # The same alpha was published as [] and as [1].
            target.copy_((change(name, whole) if change else whole).reshape(target.shape))
            return
        shape = tensors.shape(stored_name)
        if shape[0] > target.shape[0] or shape[1:] != target.shape[1:]:
            raise ValueError(f"{stored_name} is {list(shape)}, the model needs {list(target.shape)}")
        step = max(1, PART_ELEMENTS // shape[1])
        for start in range(0, shape[0], step):
            rows = tensors.read_rows(stored_name, start, min(start + step, shape[0]))
            target[start : start + len(rows)] = change(name, rows) if change else rows
        target[shape[0] :] = 0  # a table that the adapter enlarges; without the adapter its new rows say nothing

    return read


def stream_model(model: PreTrainedModel, read: ReadTensor, device: torch.device, adapter: Path | None = None) -> Any:
    """Let a model on the meta device run on `device` in float32 with the tensors that `read` gives, and with an adapter, if any.

    Raises:
        FinetuneError: PEFT refuses the adapter.
    """
    if adapter is not None:
        enlarge_tables(model, adapter)
    _fill_vectors(model, read, device)
    streamed = model if adapter is None else apply_adapter(model, adapter, assigns=True)
    core: Any = model
    prefixes = {module: path for path, module in core.named_modules()}
    memory = _Memory()
    for unit in (core.get_input_embeddings(), *core.model.layers, core.get_output_embeddings()):
        places = list(_list_places(unit, prefixes[unit]))
        unit.register_forward_pre_hook(partial(_fill, places, read, memory))
        unit.register_forward_hook(partial(_empty, places, memory))
    return streamed.eval()


def _fill_vectors(model: Any, read: ReadTensor, device: torch.device) -> None:
    """Read all vectors, and put placeholders on the device for all matrices.

    PEFT moves an adapter to the device of its base layer, so it cannot be applied to a model on the meta device.
    """
    # RoPE's numbers are computed from the configuration; no checkpoint stores them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 2:
                tensor = torch.zeros(1, device=device).expand(parameter.shape)
            else:
                tensor = torch.empty(parameter.shape)
                read(f"{path}.{name}".lstrip("."), tensor)
            module.register_parameter(name, nn.Parameter(tensor.to(device), requires_grad=False))


class _Memory:
    """Matrices of layers that have run, for the next ones: getting new pages from the system takes longer than filling them.

    It saves a fifth of the CPU time of `benchmarks/verification.py`.
    """

    def __init__(self) -> None:
        self._free: dict[torch.Size, list[torch.Tensor]] = {}

    def take(self, shape: torch.Size) -> torch.Tensor:
        if shape.numel() > _KEPT_ELEMENTS:  # a table of tokens needs the room, and comes before or after all layers
            self._free.clear()
        free = self._free.get(shape)
        return free.pop() if free else torch.empty(shape)

    def give(self, matrix: torch.Tensor) -> None:
        if matrix.numel() <= _KEPT_ELEMENTS and matrix.device.type == "cpu":
            self._free.setdefault(matrix.shape, []).append(matrix)


@dataclass(frozen=True)
class _Place:
    """A parameter that has only a placeholder, and the name of the base's tensor that belongs there."""

    module: nn.Module
    name: str
    placeholder: nn.Parameter
    stored_name: str


def _list_places(unit: nn.Module, prefix: str) -> Iterator[_Place]:
    for path, module in unit.named_modules(prefix=prefix):
        parts = [part for part in path.split(".") if part not in _WRAPPERS]
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and not any(parameter.stride()):
                yield _Place(module, name, parameter, ".".join([*parts, name]))


def _fill(places: Sequence[_Place], read: ReadTensor, memory: _Memory, *_: object) -> None:
    for place in places:
        matrix = memory.take(place.placeholder.shape)
        read(place.stored_name, matrix)
        matrix = matrix.to(place.placeholder.device)
        place.module.register_parameter(place.name, nn.Parameter(matrix, requires_grad=False))


def _empty(places: Sequence[_Place], memory: _Memory, *_: object) -> None:
    for place in places:
        memory.give(place.module.get_parameter(place.name).detach())
        place.module.register_parameter(place.name, place.placeholder)
