"""Report the content of a folder with an optimizer state, without reading its large tensors."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.files.sizes import describe_size
from finetune.yulan.states.optimizer_states import OptimizerStates, find_state_file, load_file, open_states

_PARTS = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class GroupReport:
    """A parameter group; `parameters` counts single values, `tensors` counts tensors."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    parameters: int
    tensors: int


@dataclass(frozen=True)
class StatesReport:
    """The optimizer state of a folder; `variant_notes` say how its files differ from DeepSpeed's usual ones."""

    step: int
    parameters: int
    groups: tuple[GroupReport, ...]
    optimizer: str
    bytes: int
    variant_notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)


def report_states(folder: Path) -> StatesReport:
    """Return the report of a folder's optimizer state.

    Raises:
        CheckpointError: the optimizer state cannot be read, or files are missing.
    """
    states = open_states(folder)
    sizes = {name: math.prod(shape) for name, shape in states.shapes.items()}
    groups = tuple(
        GroupReport(g.lr, g.weight_decay, g.betas, g.eps, sum(sizes[name] for name in g.names), len(g.names))
        for g in states.groups
    )
    size = sum(find_state_file(states.folder, name, part).stat().st_size for name in sizes for part in _PARTS)
    notes = tuple(_list_notes(folder, states))
    return StatesReport(states.step, sum(sizes.values()), groups, "AdamW", size, notes)


def _list_notes(folder: Path, states: OptimizerStates) -> Iterator[str]:
    if len(states.groups) == 1:
        yield "one parameter group: every parameter had the same learning rate and weight decay"
    if (states.folder / "zero" / "lm_head.weight").is_dir() and "lm_head.weight" not in states.shapes:
        yield "lm_head.weight is tied and has no moments of its own; the kit ignores its folder"
    without = [name for name in states.shapes if not find_state_file(states.folder, name, "step").is_file()]
    if without:
        yield f"{len(without)} parameters have no step of their own; the kit uses {states.step}"
    alphas = [name for name in states.shapes if name.endswith("_alpha")]
    contents = [load_file(find_state_file(states.folder, name, "fp32")) for name in alphas]
    if plain := sum(isinstance(content, dict) and "cat_dim" not in content for content in contents):
        yield f"{plain} alphas are stored without cat_dim"
    trainer = folder / "trainer_state.json"
    if trainer.is_file() and (said := _read_trainer_step(trainer)) != states.step:
        yield f"trainer_state.json says step {said}; the kit uses the optimizer state's own step, {states.step}"


def _read_trainer_step(path: Path) -> object:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("global_step") if isinstance(content, dict) else None


def describe_states(report: StatesReport) -> str:
    """Return the report as a short table."""
    lines = [
        f"step {report.step:,}, {report.optimizer}, {report.parameters:,} parameters, {describe_size(report.bytes)}",
        "",
        f"{'group':>5} {'lr':>12} {'decay':>6} {'betas':>12} {'eps':>7} {'tensors':>8} {'parameters':>14}",
    ]
    for number, group in enumerate(report.groups, 1):
        betas = f"{group.betas[0]:g}, {group.betas[1]:g}"
        lines.append(
            f"{number:>5} {group.lr:>12.6g} {group.weight_decay:>6g} {betas:>12} {group.eps:>7g} {group.tensors:>8} {group.parameters:>14,}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in report.variant_notes)])
