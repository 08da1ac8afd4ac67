"""AdamW for pre-training: in the published groups or in muP's, over float32 copies where the model is held in less."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from finetune.recipe.sections import OptimizerSection
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.states.optimizer_states import StateGroup

# Source: technical report (arXiv 2412.17743), section 3; the DeepSpeed configuration of RUC-GSAI/YuLan-Mini, pretrain/.
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1
_BETAS, _EPS = (0.9, 0.95), 1e-15
# A second moment that 8 bits round to 0 would divide by eps alone.
_EPS_8BIT = 1e-8
_MUP_WIDTH = 256  # where a configuration has no dim_model_base_lr of its own
_MASTERS = "masters"


def make_groups(model: PreTrainedModel | PeftModel, section: OptimizerSection) -> tuple[StateGroup, ...]:
    """Return the groups of a fresh start: matrices of the layers, tables, and what is not decayed.

    On the native architecture the matrices' learning rate is muP's, `lr * 256 / hidden`; a folded model and an adapter
    have no such widths, and one rate.
    """
    lr = LEARNING_RATE if section.learning_rate is None else section.learning_rate
    decay = WEIGHT_DECAY if section.weight_decay is None else section.weight_decay
    matrix_lr = lr
    if isinstance(model.config, YuLanMiniConfig) and not isinstance(model, PeftModel):
        width = vars(model.config).get("dim_model_base_lr") or _MUP_WIDTH
        matrix_lr = lr * width / model.config.hidden_size
    names: dict[str, list[str]] = {"matrices": [], "tables": [], "others": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[_name_group(name, parameter)].append(name)
    rates = {"matrices": (matrix_lr, decay), "tables": (lr, decay), "others": (lr, 0.0)}
    return tuple(
        StateGroup(tuple(members), rates[group][0], _BETAS, _EPS, rates[group][1])
        for group, members in names.items()
        if members
    )


def _name_group(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() < 2:
        return "others"
    return "tables" if "embed_tokens" in name or "lm_head" in name else "matrices"


@dataclass(frozen=True)
class OptimizerFactory:
    """Make AdamW for a model, when the trainer asks for it; `moments` are the recipe's."""

    groups: tuple[StateGroup, ...]
    moments: str = "float32"

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW in these groups, on the model's own weights where they are float32, else on copies."""
        parameters = dict(model.named_parameters())
        device = torch.device("cpu") if self.moments == "cpu" else None
        masters = _make_masters((parameters[name] for group in self.groups for name in group.names), device)
        make = self._choose_class()
        optimizer = make(
            [
                {
                    "params": [(name, masters.get(parameters[name], parameters[name])) for name in group.names],
                    "lr": group.lr,
                    "betas": group.betas,
                    "eps": max(group.eps, _EPS_8BIT) if self.moments == "8bit" else group.eps,
                    "weight_decay": group.weight_decay,
                }
                for group in self.groups
            ]
        )
        if masters:
            _keep_masters(optimizer, masters)
        return optimizer

    def _choose_class(self) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
        if self.moments == "8bit":
            made: Callable[..., torch.optim.Optimizer] = importlib.import_module("bitsandbytes.optim").AdamW8bit
            return made
        # One parameter at a time: the fused loops over all of them would hold another copy of each.
        return lambda groups: torch.optim.AdamW(groups, foreach=False)


def _make_masters(parameters: Iterable[nn.Parameter], device: torch.device | None) -> dict[nn.Parameter, nn.Parameter]:
    """Return float32 copies of the parameters that are held in less, or that are stepped elsewhere.

    The gradient of one backward pass is of the parameter's own type, as in the published runs; from then on it is
    float32, so that accumulating and clipping round nothing.
    """
    masters: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in parameters:
        if parameter.dtype != torch.float32 or (device is not None and parameter.device != device):
            copy = parameter.detach().to(device=device or parameter.device, dtype=torch.float32, copy=True)
            masters[parameter] = nn.Parameter(copy)
            parameter.grad_dtype = None  # any
            parameter.register_post_accumulate_grad_hook(_widen_gradient)
    return masters


def _widen_gradient(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad = parameter.grad.float()


def _keep_masters(optimizer: torch.optim.Optimizer, masters: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Let an optimizer step copies and hand the result to the weights; the copies are saved and loaded with its state."""

    def take_gradients(*_: Any) -> None:
        for parameter, master in masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.device, torch.float32)

    @torch.no_grad()
    def hand_over(*_: Any) -> None:
        for parameter, master in masters.items():
            master.grad = None
            parameter.copy_(master)

    def save_masters(_: torch.optim.Optimizer, content: dict[str, Any]) -> None:
        content[_MASTERS] = [master.detach() for master in masters.values()]

    load_rest = optimizer.load_state_dict

    @torch.no_grad()
    def load_all(content: dict[str, Any], **options: Any) -> None:
        for master, saved in zip(masters.values(), content[_MASTERS], strict=True):
            master.copy_(saved)
        load_rest({name: value for name, value in content.items() if name != _MASTERS}, **options)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(hand_over)
    optimizer.register_state_dict_post_hook(save_masters)
    # Not by a hook: bitsandbytes loads by a method of its own, which calls none.
    optimizer.load_state_dict = load_all  # type: ignore[method-assign, assignment]
