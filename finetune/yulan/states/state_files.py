"""Write the optimizer state in DeepSpeed's universal layout, so that any program that reads this layout can continue from it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from finetune.yulan.states.optimizer_states import ParameterState, StateGroup


def write_states(folder: Path, step: int, groups: Sequence[StateGroup], read: Callable[[str], ParameterState]) -> None:
    """Write the optimizer state of all groups into a folder, one parameter at a time; `read` returns that of a parameter.

    Source: the layout that DeepSpeed 0.16's `ds_to_universal` writes.
    """
    root = folder / f"global_step{step}_universal"
    shapes: list[dict[str, torch.Size]] = []
    for group in groups:
        shapes.append({})
        for name in group.names:
            state = read(name)
            shapes[-1][name] = state.weight.shape
            _write_parameter(root / "zero" / name, state)
    model = {
        "param_shapes": shapes,
        "lr_scheduler": {"base_lrs": [group.lr for group in groups]},
        "global_steps": step,
    }
    options = [
        {"lr": group.lr, "betas": group.betas, "eps": group.eps, "weight_decay": group.weight_decay} for group in groups
    ]
    torch.save(model, root / "mp_rank_00_model_states.pt")
    torch.save({"param_groups": options}, root / "zero" / "optimizer_state.pt")
    (folder / "latest_universal").write_text(root.name, encoding="utf-8")


def _write_parameter(folder: Path, state: ParameterState) -> None:
    folder.mkdir(parents=True)
    for part, tensor in (("fp32", state.weight), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        # A view would be saved with its whole storage, so it is cloned.
        torch.save({"cat_dim": 0, "param": tensor.detach().float().cpu().clone()}, folder / f"{part}.pt")
    torch.save(torch.tensor(float(state.step)), folder / "step.pt")
