"""Optimizer states in DeepSpeed's universal layout, read without DeepSpeed, tensor by tensor.

State files are pickles: they are read with `weights_only=True`, which runs nothing that a file brings along.
Source: the layout that DeepSpeed 0.16's `ds_to_universal` writes.
"""

import contextlib
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import CheckpointError

_PARTS = ("fp32", "exp_avg", "exp_avg_sq")
# optimizer_state.pt pickles these two beside its groups. The readers get empty classes of those names instead.
_STUBBED = ("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.zero.config.ZeroStageEnum")


class _Stub:
    """Stand for a DeepSpeed object whose content is not needed."""

    def __init__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class StateGroup:
    """A parameter group as it was trained; `lr` is the base one, before any schedule."""

    names: tuple[str, ...]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class ParameterState:
    """The fp32 weight of one parameter with its AdamW moments, all in one shape."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int


@dataclass(frozen=True)
class OptimizerStates:
    """An opened folder; no tensor of it is held."""

    folder: Path
    step: int
    groups: tuple[StateGroup, ...]
    shapes: dict[str, tuple[int, ...]]


def open_states(folder: Path) -> OptimizerStates:
    """Read what a folder with `latest_universal` holds, except the tensors themselves.

    Raises:
        CheckpointError: a file is absent, unreadable, or says something that does not fit the others.
    """
    root = _find_root(folder)
    path = root / "mp_rank_00_model_states.pt"
    model = _load(path)
    groups = _load(root / "zero" / "optimizer_state.pt")
    try:
        shapes = [{name: tuple(shape) for name, shape in part.items()} for part in model["param_shapes"]]
        lrs = [float(lr) for lr in model["lr_scheduler"]["base_lrs"]]
        options = groups["param_groups"]
        if not len(shapes) == len(lrs) == len(options):
            raise CheckpointError(
                f"{path}: {len(shapes)} groups of names, {len(lrs)} learning rates, {len(options)} groups of options; these must be as many"
            )
        made = tuple(
            StateGroup(
                tuple(names),
                lr,
                (float(o["betas"][0]), float(o["betas"][1])),
                float(o["eps"]),
                float(o["weight_decay"]),
            )
            for names, lr, o in zip(shapes, lrs, options, strict=True)
        )
        step = int(model["global_steps"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not the states of a universal checkpoint: {error!r}; download it again"
        ) from error
    return OptimizerStates(root, step, made, {name: shape for part in shapes for name, shape in part.items()})


def read_state(states: OptimizerStates, name: str, shape: torch.Size) -> ParameterState:
    """Read one parameter's tensors, in `shape`.

    Raises:
        CheckpointError: a file is absent or unreadable, or its tensor is misshapen or not finite.
    """
    folder = states.folder / "zero" / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or not folder.resolve().is_relative_to(states.folder):
        raise CheckpointError(f"{states.folder}: {name!r} leads out of the folder; such states are not read")
    weight, first, second = (_read_tensor(folder / f"{part}.pt", name, shape) for part in _PARTS)
    path = folder / "step.pt"
    if not path.is_file():
        return ParameterState(weight, first, second, states.step)
    try:
        return ParameterState(weight, first, second, int(_load(path)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name} must have a whole number as its step: {error}") from error


def _read_tensor(path: Path, name: str, shape: torch.Size) -> torch.Tensor:
    content = _load(path)
    tensor = content.get("param") if isinstance(content, dict) else None
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
        raise CheckpointError(f"{path}: {name} must be a float32 tensor under 'param'; download the states again")
    if tensor.shape != shape and not tensor.numel() == shape.numel() == 1:
        raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}; the model's is {list(shape)}")
    tensor = tensor.detach()
    # One sum is 30 times faster than asking every value, and is finite only where all are; huge ones may overflow it.
    if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name} holds values that are not finite; download the states again")
    return tensor.reshape(shape)


def check_parameters(states: OptimizerStates, model: nn.Module) -> None:
    """Compare the names and shapes of states with a model's parameters.

    Raises:
        CheckpointError: one is missing, not the model's, or misshapen.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    misshapen = {name for name in shapes.keys() & states.shapes if not _fits(states.shapes[name], shapes[name])}
    for text, names in (
        ("missing", shapes.keys() - states.shapes),
        ("not the model's", states.shapes.keys() - shapes),
        ("misshapen", misshapen),
    ):
        if names:
            name = min(names)
            sizes = f": {list(states.shapes[name])}, the model's is {list(shapes[name])}" if names is misshapen else ""
            raise CheckpointError(
                f"{states.folder}: {name} is {text}{sizes} ({len(names)} such); take the states of this model"
            )


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return found == expected or math.prod(found) == math.prod(expected) == 1


def make_adamw(model: nn.Module, states: OptimizerStates) -> torch.optim.AdamW:
    """Load weights and moments into an fp32 model and return AdamW in the published groups.

    Raises:
        CheckpointError: the model and the states do not have the same parameters.
    """
    check_parameters(states, model)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameters[n] for n in g.names],
                "lr": g.lr,
                "betas": g.betas,
                "eps": g.eps,
                "weight_decay": g.weight_decay,
            }
            for g in states.groups
        ]
    )
    for name, parameter in parameters.items():
        state = read_state(states, name, parameter.shape)
        with torch.no_grad():
            parameter.copy_(state.weight)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.exp_avg.to(parameter.device),
            "exp_avg_sq": state.exp_avg_sq.to(parameter.device),
        }
    return optimizer


def _find_root(folder: Path) -> Path:
    pointer = folder / "latest_universal"
    try:
        root = (folder / pointer.read_text(encoding="utf-8").strip()).resolve()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{pointer}: cannot be read: {error}; the folder holds no optimizer states") from error
    if not root.is_relative_to(folder.resolve()) or root == folder.resolve():
        raise CheckpointError(f"{pointer}: must name a folder inside {folder}")
    return root


def _load(path: Path) -> Any:
    with _refuse_unreadable(path), torch.serialization.safe_globals([(_Stub, name) for name in _STUBBED]):
        return torch.load(path, weights_only=True, map_location="cpu")


@contextlib.contextmanager
def _refuse_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(
            f"{path}: cannot be read as tensors and plain values ({reason}); download it again"
        ) from error
