"""Choose the device of this process, and the dtypes of weights and of matrix products."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from finetune.files.launcher import read_local_rank
from finetune.models.engine import Engine, find_engine
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.yulan.tensors import WEIGHT_DTYPES

AutocastDtype = Literal["no", "bf16", "fp16"]
# Instructions for products in bfloat16, as torch names them: of x86 processors, and of ARM's.
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, the autocast dtype of matrix products, and the dtype that FSDP2 computes in (None: its default)."""

    weights: torch.dtype
    autocast: AutocastDtype
    shared: torch.dtype | None = None


def choose_device(use_cpu: bool = False) -> torch.device:
    """Return the device of this process: the NVIDIA GPU of its LOCAL_RANK, else Apple's GPU, else the CPU."""
    if use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", read_local_rank())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_precision(
    dtype: str, device: torch.device, trains_all_weights: bool, keeps_masters: bool = False
) -> Precision:
    """Choose the precision of a run from the recipe's `model.dtype`; `auto` takes what suits the device.

    Where all weights are trained, `auto` and `float16` hold them in float32: 16 bits would round most updates away, and float16
    gradients cannot be unscaled. An optimizer that steps float32 copies (`keeps_masters`) leaves the model in bfloat16, and all of
    it computes in that dtype, as in the published runs.
    """
    if keeps_masters and trains_all_weights:
        held = replace(choose_precision(dtype, device, trains_all_weights=False), autocast="no")
        if held.weights == torch.bfloat16:
            if find_engine() == "one":
                return held
            # Processes that exchange gradients hold float32 weights.
            is_shared = find_engine() == "fsdp2"
            return Precision(torch.float32, "no", torch.bfloat16) if is_shared else Precision(torch.float32, "bf16")
    if dtype == "auto":
        if device.type == "cpu":
            dtype = "float32"
        elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "float16"
        else:
            dtype = "bfloat16"
        if trains_all_weights:
            return Precision(torch.float32, _name_autocast(dtype))
    if dtype == "float16" and trains_all_weights:
        return Precision(torch.float32, "fp16")
    return Precision(WEIGHT_DTYPES[dtype], _name_autocast(dtype))


def _name_autocast(dtype: str) -> AutocastDtype:
    names: dict[str, AutocastDtype] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return names[dtype]


def choose_planned_precision(
    resolved: ResolvedRecipe, is_gpu: bool, has_bf16: bool, engine: Engine = "one"
) -> Precision:
    """Choose the precision of a run on the machine that a plan is made for.

    float16 is planned as bfloat16, which has the same size and to which a CPU can autocast.
    """
    trains_all, dtype, pretrains = (
        resolved.trains_all_weights,
        resolved.recipe.model.dtype,
        resolved.method.is_pretraining,
    )
    cpu = torch.device("cpu")
    if not is_gpu:
        return choose_precision(dtype, cpu, trains_all, keeps_masters=pretrains)
    if trains_all and pretrains and engine == "one" and has_bf16 and dtype in ("auto", "bfloat16"):
        return Precision(torch.bfloat16, "no")
    # Processes that exchange the gradients of pre-training hold float32 weights.
    widens = pretrains and engine != "one" and dtype == "bfloat16"
    if trains_all and (dtype in ("auto", "float16") or widens or not has_bf16):
        return Precision(torch.float32, "bf16")
    return choose_precision("float32" if dtype == "float32" else "bfloat16", cpu, trains_all)


def find_missing_instructions(device: torch.device) -> str | None:
    """Return what a processor lacks for products in bfloat16, or None."""
    if device.type != "cpu":
        return f"they are for a processor, and the run uses a {device.type} device"
    read = getattr(torch.cpu, "get_capabilities", None)  # torch 2.13 has it, 2.6 does not
    known = {} if read is None else read()
    if any(known.get(name) for name in _BF16_INSTRUCTIONS):
        return None
    return "torch finds no instructions for bfloat16 in this processor (AMX, AVX-512 BF16 or ARM's)"
