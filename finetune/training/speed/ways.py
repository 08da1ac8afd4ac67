"""The ways to make training faster, in the order in which they are tried, and whether a resumed run can use those that it chose."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from finetune.errors import TrainingError
from finetune.models.precision import find_missing_instructions
from finetune.models.streaming.from_main_memory import list_layers
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.resuming import SpeedChoice, read_run_record, read_speed
from finetune.runs.run_files import RECORD_FILE, find_result_folder
from finetune.training.speed.adapter_copies import AdapterCopies, list_lora_matrices
from finetune.training.speed.bfloat16_products import BFloat16Products
from finetune.training.speed.compiled_layers import CompiledLayers, find_missing_compiler
from finetune.training.speed.flash_attention import FlashAttention, find_missing_flash
from finetune.training.speed.fused_kernels import FusedKernels, find_missing_kernels
from finetune.training.speed.switch import Switch


@dataclass(frozen=True)
class Way:
    """A way to make training faster.

    `faster` is the part of the time that it may take at most. `same_bits`: it computes exactly what is computed without it, not
    only the same within the rounding of the type. `rounds_to` is the type whose rounding its figures may show, where that is not the
    type that the run computes in without it. `needs_long_run`: it takes about a minute to begin. `without` names those that it is not
    used together with.
    """

    make: Callable[[Trainer, ResolvedRecipe, torch.dtype], Switch]
    find_missing: Callable[[torch.device], str | None]
    faster: float = 0.97  # what is gained must be more than what the clock of a busy machine gains and loses
    same_bits: bool = False
    rounds_to: torch.dtype | None = None
    needs_long_run: bool = False
    without: tuple[str, ...] = ()


def _make_products(trainer: Trainer, resolved: ResolvedRecipe, dtype: torch.dtype) -> Switch:
    return BFloat16Products(trainer, dtype, resolved.recipe.model.dtype)


def _make_flash(trainer: Trainer, resolved: ResolvedRecipe, dtype: torch.dtype) -> Switch:
    model: Any = trainer.model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return FlashAttention(base, dtype, resolved.recipe.model.attention)


def _make_compiled(trainer: Trainer, resolved: ResolvedRecipe, dtype: torch.dtype) -> Switch:
    return CompiledLayers(list_layers(trainer.model))


def _make_fused(trainer: Trainer, resolved: ResolvedRecipe, dtype: torch.dtype) -> Switch:
    return FusedKernels(list_layers(trainer.model))


def _make_copies(trainer: Trainer, resolved: ResolvedRecipe, dtype: torch.dtype) -> Switch:
    return AdapterCopies(list_lora_matrices(trainer.model), dtype)


def _find_nothing_missing(device: torch.device) -> None:
    return None


COMPILED = "compiled layers"
# By name, as records of runs have them.
WAYS: dict[str, Way] = {
    "bfloat16 products": Way(_make_products, find_missing_instructions, rounds_to=torch.bfloat16),
    "flash attention": Way(_make_flash, find_missing_flash),
    COMPILED: Way(_make_compiled, find_missing_compiler, needs_long_run=True),
    "fused kernels": Way(_make_fused, find_missing_kernels, without=(COMPILED,)),
    # Copies cost nothing, and may be as fast.
    "adapter copies": Way(_make_copies, _find_nothing_missing, faster=1.05, same_bits=True, without=(COMPILED,)),
}


def read_choice(run: Path) -> SpeedChoice:
    """Return what a run chose when it began, as its record says; a run without a choice goes on as it was.

    Raises:
        TrainingError: the record is damaged, or names a way that this version does not know.
    """
    if (choice := read_speed(run)) is None:
        return SpeedChoice((), "the run began without")
    if unknown := [name for name in choice.ways if name not in WAYS]:
        raise TrainingError(
            f"{run / RECORD_FILE}: speed: the run trains with {', '.join(unknown)}, and this version knows {', '.join(WAYS)}; resume it "
            "with the version that began it, or start again with another output"
        )
    return choice


def check_choice(run: Path, device: torch.device) -> None:
    """Check that a run which is to be resumed can compute here as it began; one that has its result trains no more.

    Raises:
        TrainingError: something is missing that it began with.
    """
    if find_result_folder(run) is not None and read_run_record(run).get("status") != "running":
        return
    for name in read_choice(run).ways:
        if (missing := WAYS[name].find_missing(device)) is not None:
            raise TrainingError(
                f"{run}: the run began with {name} (model.speed: auto), and a resumed run must compute as it began; but {missing}; "
                "mend this, resume the run on the machine where it began, or start again with another output"
            )
