"""Read and set the moments of AdamW: torch holds them in float32, bitsandbytes in 8 bits."""

import importlib
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

# The elements that bitsandbytes' AdamW quantizes with one scale. Source: bitsandbytes/optim/optimizer.py of 0.50, `init_state`.
_BLOCK = 256


def put_moments(optimizer: Any, parameter: nn.Parameter, first: torch.Tensor, second: torch.Tensor, step: int) -> None:
    """Set both moments and the step of a parameter; the optimizer keeps the tensors and will change them."""
    inner = _unwrap(optimizer)
    if isinstance(inner, torch.optim.AdamW):
        inner.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
        return
    functional = importlib.import_module("bitsandbytes.functional")
    group, place = next(
        (number, place)
        for number, made in enumerate(inner.param_groups)
        for place, own in enumerate(made["params"])
        if own is parameter
    )
    inner.init_state(inner.param_groups[group], parameter, group, place)
    state = inner.state[parameter]
    state["step"] = step
    for number, moment in (("1", first), ("2", second)):
        if state[f"state{number}"].dtype != torch.uint8:  # small tensors are not quantized
            state[f"state{number}"] = moment
            continue
        packed, made = functional.quantize_blockwise(moment, code=state[f"qmap{number}"], blocksize=_BLOCK)
        state[f"state{number}"], state[f"absmax{number}"] = packed, made.absmax


def get_moments(optimizer: Any, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return both moments of a parameter in float32, and its step."""
    inner = _unwrap(optimizer)
    state = inner.state[parameter]
    if isinstance(inner, torch.optim.AdamW):
        return state["exp_avg"], state["exp_avg_sq"], int(state["step"])
    first, second = (_read_moment(state, number) for number in ("1", "2"))
    return first, second, int(state["step"])


def _read_moment(state: dict[str, Any], number: str) -> torch.Tensor:
    packed: torch.Tensor = state[f"state{number}"]
    if packed.dtype != torch.uint8:
        return packed
    functional = importlib.import_module("bitsandbytes.functional")
    absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
    full: torch.Tensor = functional.dequantize_blockwise(packed, absmax=absmax, code=code, blocksize=_BLOCK)
    return full


def _unwrap(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
