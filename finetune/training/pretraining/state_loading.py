"""Load a run's optimizer state from a universal checkpoint before its first step, and write one after its last."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.compat import find_share
from finetune.training.pretraining.moments import get_moments, put_moments
from finetune.yulan.states.optimizer_states import OptimizerStates, ParameterState, StateGroup, read_state
from finetune.yulan.states.state_files import write_states


class StatesLoader(TrainerCallback):
    """Sets weights and moments from a universal checkpoint when a run begins; each process loads its own share.

    It is a callback because sharding replaces the parameters, and an optimizer would lose the moments of the old ones.
    """

    def __init__(self, states: OptimizerStates) -> None:
        self._states = states

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: object,
    ) -> None:
        """Load weights and moments, unless the run resumes from a checkpoint of its own.

        Raises:
            CheckpointError: a file is absent, unreadable, or does not fit its parameter.
        """
        if model is None or state.global_step:
            return
        weights = dict(model.named_parameters())
        for name, parameter in list_named_parameters(optimizer):
            load_parameter(optimizer, parameter, read_state(self._states, name, parameter.shape))
            weight = weights.get(name, parameter)
            if weight is not parameter:
                weight.data.copy_(parameter.detach())


def list_named_parameters(optimizer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and tensor of each parameter that an optimizer steps, which may be a float32 copy or a share."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


@torch.no_grad()
def load_parameter(optimizer: Any, parameter: nn.Parameter, state: ParameterState) -> None:
    """Set a parameter and its moments to the values of a file."""
    is_share = isinstance(parameter, DTensor)
    parameter.data.copy_(take_share(state.weight, parameter) if is_share else state.weight)
    first, second = (take_share(moment, parameter) for moment in (state.exp_avg, state.exp_avg_sq))
    put_moments(optimizer, parameter, first, second, state.step)


def take_share(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a tensor, or all of it where its parameter is not sharded; only the share is copied."""
    if not isinstance(parameter, DTensor):
        return full.to(parameter.device, copy=True)
    shape, offset = find_share(parameter.shape, parameter.device_mesh, parameter.placements)
    part = full[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    local = part.to(parameter.device, copy=True)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def save_states(folder: Path, optimizer: Any, *, is_writer: bool = True) -> None:
    """Write an optimizer's state into the folder of a result; every process must call it where it is sharded, and one writes."""
    parameters = dict(list_named_parameters(optimizer))
    groups = [
        StateGroup(tuple(g["param_names"]), g.get("initial_lr", g["lr"]), g["betas"], g["eps"], g["weight_decay"])
        for g in optimizer.param_groups
    ]

    def read(name: str) -> ParameterState:
        parameter = parameters[name]
        first, second, step = get_moments(optimizer, parameter)
        return ParameterState(_gather(parameter), _gather(first), _gather(second), step)

    if is_writer:
        write_states(folder, int(next(iter(optimizer.state.values()))["step"]), groups, read)
    else:
        for name in parameters:
            read(name)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    full: torch.Tensor = tensor.full_tensor()
    return full.detach()
