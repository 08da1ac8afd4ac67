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

ReadTensor = Callable[[str], torch.Tensor]
# PEFT puts a module into these, and keeps the base's tensors under their own names within them.
_WRAPPERS = frozenset(["base_layer", "original_module", "token_adapter"])
PART_ELEMENTS = 1 << 22  # of a matrix that is read, at most these at a time


def read_stored(tensors: TensorFolder, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None) -> ReadTensor:
    """Return a function that reads a model's tensors from a checkpoint as float32; a tied head is its embedding.

    `change` is given each tensor's name and some of its rows at a time, as stored, and returns them changed.
    """

    def read(name: str) -> torch.Tensor:
        stored_name = EMBEDDING if name == HEAD and HEAD not in tensors.entries else name
        shape = tensors.shape(stored_name)
        if len(shape) < 2:
            whole = tensors.read(stored_name)
            return (change(name, whole) if change else whole).float()
        found = torch.empty(shape)
        step = max(1, PART_ELEMENTS // shape[1])
        for start in range(0, shape[0], step):
            rows = tensors.read_rows(stored_name, start, min(start + step, shape[0]))
            found[start : start + step] = change(name, rows) if change else rows
        return found

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
    for unit in (core.get_input_embeddings(), *core.model.layers, core.get_output_embeddings()):
        places = list(_list_places(unit, prefixes[unit]))
        unit.register_forward_pre_hook(partial(_fill, places, read))
        unit.register_forward_hook(partial(_empty, places))
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
            else:  # the same alpha was published as [] and as [1]
                tensor = read(f"{path}.{name}".lstrip(".")).to(device).reshape(parameter.shape)
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


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


def _fill(places: Sequence[_Place], read: ReadTensor, *_: object) -> None:
    for place in places:
        tensor = read(place.stored_name).to(place.placeholder.device)
        missing = len(place.placeholder) - len(tensor)
        if missing > 0:  # a table that the adapter enlarges; without the adapter its new rows say nothing
            tensor = nn.functional.pad(tensor, (0, 0, 0, missing))
        if tensor.shape != place.placeholder.shape:
            raise ValueError(
                f"{place.stored_name} is {list(tensor.shape)}, the model needs {list(place.placeholder.shape)}"
            )
        place.module.register_parameter(place.name, nn.Parameter(tensor, requires_grad=False))


def _empty(places: Sequence[_Place], *_: object) -> None:
    for place in places:
        place.module.register_parameter(place.name, place.placeholder)
