"""Make AdamW for pre-training, with the published parameter groups or muP's, over float32 weights."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from finetune.compat import replace_loading
from finetune.recipe.sections import OptimizerSection
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.states.optimizer_states import StateGroup

# Source: technical report (arXiv 2412.17743), section 3; the DeepSpeed configuration of RUC-GSAI/YuLan-Mini, pretrain/.
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1
_BETAS, _EPS = (0.9, 0.95), 1e-15
# Where 8 bits round a second moment to 0, the update is divided by eps alone, so eps must not be tiny.
_EPS_8BIT = 1e-8
_MUP_WIDTH = 256  # for configurations without dim_model_base_lr
_MASTERS = "masters"


def make_groups(model: PreTrainedModel | PeftModel, section: OptimizerSection) -> tuple[StateGroup, ...]:
    """Return the parameter groups of a run without published optimizer state: matrices, tables, and parameters without decay.

    On the native architecture, matrices have the learning rate of muP, `lr * 256 / hidden`. A folded model and an adapter have
    one learning rate.
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
    """Makes AdamW when the trainer asks for it; `moments` is the recipe's `optimizer.moments`."""

    groups: tuple[StateGroup, ...]
    moments: str = "float32"

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW with these groups; weights that are not float32 are stepped as float32 copies."""
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
        # foreach would hold another copy of all parameters.
        return lambda groups: torch.optim.AdamW(groups, foreach=False)


def _make_masters(parameters: Iterable[nn.Parameter], device: torch.device | None) -> dict[nn.Parameter, nn.Parameter]:
    """Return float32 copies of the parameters that are held in fewer bits, or whose optimizer step runs on another device.

    One backward pass gives a gradient in the parameter's own dtype, as in the published runs. It is then widened to float32, so
    that accumulating and clipping do not round.
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
    """Let an optimizer step the copies and write the result into the weights; the copies are saved with its state."""

    def take_gradients(*_: Any) -> None:
        for parameter, master in masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.device, torch.float32)

    @torch.no_grad()
    def write_back(*_: Any) -> None:
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
    optimizer.register_step_post_hook(write_back)
    optimizer.register_state_dict_post_hook(save_masters)
    replace_loading(optimizer, load_all)
