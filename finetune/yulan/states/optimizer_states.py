"""Read optimizer states in DeepSpeed's universal layout without DeepSpeed, tensor by tensor.

The files are pickles. They are read with `weights_only=True`, which runs no code from a file.
Source: the layout that DeepSpeed 0.16's `ds_to_universal` writes.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import CheckpointError

POINTER = "latest_universal"
RESULT = "model"  # the folder in a run directory that holds the trained weights and the optimizer state
_HEAD = "lm_head.weight"
_PARTS = ("fp32", "exp_avg", "exp_avg_sq")
# optimizer_state.pt pickles objects of these two classes beside its groups. An empty class is loaded instead of each.
_STUBBED = ("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.zero.config.ZeroStageEnum")


class _Stub:
    """A replacement for a DeepSpeed object whose content is not needed."""

    def __init__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class StateGroup:
    """A parameter group of the optimizer; `lr` is the base learning rate, before any schedule."""

    names: tuple[str, ...]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class ParameterState:
    """The fp32 weight of one parameter and its AdamW moments, all of the same shape, and its number of steps."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int


@dataclass(frozen=True)
class OptimizerStates:
    """An opened folder with an optimizer state: its groups, and the shapes of its tensors, which are not in memory."""

    folder: Path
    step: int
    groups: tuple[StateGroup, ...]
    shapes: dict[str, tuple[int, ...]]


def open_states(folder: Path) -> OptimizerStates:
    """Open a folder with `latest_universal`, or a run directory with such a result; read everything but the tensors.

    Raises:
        CheckpointError: a file is missing or unreadable, or contradicts another.
    """
    root = _find_root(folder)
    path = root / "mp_rank_00_model_states.pt"
    # Mapped, because this file also holds a copy of the weights, which is not needed.
    model, groups = load_file(path, mmap=True), load_file(root / "zero" / "optimizer_state.pt")
    try:
        shapes = [_read_shapes(root, part) for part in model["param_shapes"]]
        lrs = [float(lr) for lr in model["lr_scheduler"]["base_lrs"]]
        options = groups["param_groups"]
        if not len(shapes) == len(lrs) == len(options):
            raise CheckpointError(
                f"{path}: {len(shapes)} groups of names, {len(lrs)} learning rates and {len(options)} groups of options; the three "
                "numbers must be equal; download the optimizer state again"
            )
        for part in shapes:
            # The head is tied. Newer versions of DeepSpeed write only a rounded weight for it.
            if _HEAD in part and not find_state_file(root, _HEAD, "exp_avg").is_file():
                del part[_HEAD]
        made = tuple(
            _read_group(tuple(names), lr, o) for names, lr, o in zip(shapes, lrs, options, strict=True) if names
        )
        _check_names(root, [name for part in shapes for name in part])
        first = next(name for part in shapes for name in part)
        step = _read_step(root, first) if find_state_file(root, first, "step").is_file() else int(model["global_steps"])
        if step < 0:
            raise ValueError(f"{step} steps")
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, StopIteration, OSError) as error:
        raise CheckpointError(
            f"{path}: is not the optimizer state of a universal checkpoint: {error!r}; download it again"
        ) from error
    return OptimizerStates(root, step, made, {name: shape for part in shapes for name, shape in part.items()})


def _read_shapes(root: Path, part: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in part.items():
        find_state_file(root, name, "fp32")  # refuses a name that leads out of the folder
        shapes[name] = tuple(shape)
        if not all(type(size) is int and size >= 0 for size in shapes[name]):
            raise ValueError(f"{name} cannot have the shape {shape!r}")
    return shapes


def _check_names(root: Path, names: Sequence[str]) -> None:
    """Check that no parameter stands in two groups, and that no file is missing."""
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(f"{root}: {doubled[0]} stands in two groups ({len(doubled)} such); download it again")
    files = [(name, part) for name in names for part in _PARTS]
    if missing := [f"{name}/{part}.pt" for name, part in files if not find_state_file(root, name, part).is_file()]:
        raise CheckpointError(
            f"{root / 'zero'}: {missing[0]} is missing ({len(missing)} such files); download the optimizer state again, or train "
            "with optimizer.states: fresh"
        )


def _read_group(names: tuple[str, ...], lr: float, options: Any) -> StateGroup:
    betas = (float(options["betas"][0]), float(options["betas"][1]))
    group = StateGroup(names, lr, betas, float(options["eps"]), float(options["weight_decay"]))
    numbers = (group.lr, *group.betas, group.eps, group.weight_decay)
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or max(betas) >= 1:
        raise ValueError(f"AdamW cannot have {group.lr=}, {group.betas=}, {group.eps=}, {group.weight_decay=}")
    return group


def read_state(states: OptimizerStates, name: str, shape: torch.Size) -> ParameterState:
    """Read the weight and the moments of one parameter, reshaped to `shape`.

    Raises:
        CheckpointError: a file is missing or unreadable, or its tensor has another shape or values that are not finite.
    """
    weight, first, second = (_read_tensor(find_state_file(states.folder, name, part), name, shape) for part in _PARTS)
    has_step = find_state_file(states.folder, name, "step").is_file()
    return ParameterState(weight, first, second, _read_step(states.folder, name) if has_step else states.step)


def find_state_file(root: Path, name: str, part: str) -> Path:
    """Return the path of one part of a parameter's state; the parts are `fp32`, `exp_avg`, `exp_avg_sq` and `step`.

    Raises:
        CheckpointError: the name leads out of the folder.
    """
    folder = root / "zero" / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or not folder.resolve().is_relative_to(root):
        raise CheckpointError(f"{root}: {name!r} leads out of the folder; such an optimizer state is not read")
    return folder / f"{part}.pt"


def _read_step(root: Path, name: str) -> int:
    path = find_state_file(root, name, "step")
    try:
        step = int(load_file(path))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name} must have a whole number as its step: {error}") from error
    if step < 0:
        raise CheckpointError(f"{path}: {name} has step {step}; download the optimizer state again")
    return step


def _read_tensor(path: Path, name: str, shape: torch.Size) -> torch.Tensor:
    content = load_file(path, mmap=True)  # mapped, so that only the part that is copied takes memory
    tensor = content.get("param") if isinstance(content, dict) else None
    if (
        not isinstance(tensor, torch.Tensor)
        or (tensor.dtype, tensor.layout) != (torch.float32, torch.strided)
        or tensor.device.type != "cpu"  # a meta tensor has no values
    ):
        raise CheckpointError(
            f"{path}: {name} must be a float32 tensor under 'param'; download the optimizer state again"
        )
    if tensor.shape != shape and not tensor.numel() == shape.numel() == 1:
        raise CheckpointError(
            f"{path}: {name} has the shape {list(tensor.shape)}, in the model it has {list(shape)}; use the optimizer state of "
            "this model"
        )
    tensor = tensor.detach()
    # The sum is 30 times faster than a check of every value. If it is finite, every value is; large finite values may still
    # overflow it.
    if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{path}: {name} holds values that are not finite; download the optimizer state again")
    if path.stem == "exp_avg_sq" and tensor.numel() and tensor.min() < 0:
        raise CheckpointError(f"{path}: {name} holds second moments below 0; download the optimizer state again")
    return tensor.reshape(shape)


def check_parameters(states: OptimizerStates, model: nn.Module) -> None:
    """Compare the names and shapes of an optimizer state with a model's parameters.

    Raises:
        CheckpointError: a parameter is missing, not one of the model's, or of another shape.
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
                f"{states.folder}: {name} is {text}{sizes} ({len(names)} such); use the optimizer state of this model"
            )


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return found == expected or math.prod(found) == math.prod(expected) == 1


def _find_root(folder: Path) -> Path:
    if not any((place / POINTER).is_file() for place in (folder, folder / RESULT)):
        raise CheckpointError(
            f"{folder}: holds no optimizer state (there is no {POINTER} in it); give a folder that has one"
        )
    folder = folder if (folder / POINTER).is_file() else folder / RESULT
    pointer = folder / POINTER
    try:
        root = (folder / pointer.read_text(encoding="utf-8").strip()).resolve()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{pointer}: cannot be read: {error}; download it again") from error
    if not root.is_relative_to(folder.resolve()) or root == folder.resolve():
        raise CheckpointError(f"{pointer}: must name a folder inside {folder}; download it again")
    return root


def load_file(path: Path, *, mmap: bool = False) -> Any:
    """Return the tensors and plain values of a state file; no code from it is run.

    Raises:
        CheckpointError: the file cannot be read, or holds other objects.
    """
    with _refuse_unreadable(path), torch.serialization.safe_globals([(_Stub, name) for name in _STUBBED]):
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)


@contextlib.contextmanager
def _refuse_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged pickle can raise any exception
        reason = (str(error).splitlines() or [""])[0][:160]
        raise CheckpointError(
            f"{path}: cannot be read as tensors and plain values ({reason}); download it again"
        ) from error
