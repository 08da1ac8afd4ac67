"""Predict the peak memory of a recipe's training step: the real step, on tensors that have a shape and no content."""

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes import functional as quantization
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from finetune.plan.dry_model import build_dry_model, find_model_config, make_full_rows, make_stand_in_tokenizer
from finetune.plan.kernels import GPU_WORKSPACES, allocate_as_gpu, build_masks_as_in_run
from finetune.plan.stages import LOSS, WORKSPACE, follow_training
from finetune.plan.tracker import MemoryTracker, Peak
from finetune.recipe import Recipe
from finetune.train.model import Precision, choose_precision
from finetune.train.trainer import build_trainer

# A dry run writes nothing, evaluates nothing and says nothing.
_DRY_OPTIONS: Mapping[str, Any] = {
    "max_steps": 2,
    "use_cpu": True,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
}


@dataclass(frozen=True)
class StepMemory:
    """The live tensors of a training step at their peak, and the most that the loss ever takes."""

    peak: Peak
    loss_bytes: int
    trainable: int
    parameters: int


def measure_step(recipe: Recipe, is_gpu: bool, has_bf16: bool = True) -> StepMemory:
    """Run two steps of a recipe without content and return their memory on a GPU, or on the CPU of this machine.

    Raises:
        FinetuneError: the start's sizes cannot be found, or the recipe cannot be trained.
    """
    precision = choose_planned_precision(recipe, is_gpu, has_bf16)
    batch = int(recipe.trainer.get("per_device_train_batch_size", 8))
    is_packed = bool(recipe.trainer.get("packing"))
    config = find_model_config(recipe.model)
    _prepare_quantization_tables()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(build_masks_as_in_run())
        if is_gpu:
            stack.enter_context(allocate_as_gpu())
        dry = replace(recipe, trainer={**_keep_options(recipe), **_DRY_OPTIONS}, output=folder)
        rows = make_full_rows(recipe)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = build_dry_model(recipe, config, precision, fake)
        with fake:
            trainer = build_trainer(dry, model, make_stand_in_tokenizer(), rows, precision)
        if int(recipe.trainer.get("gradient_accumulation_steps", 1)) > 1:
            _keep_gradients(trainer)
        tracker = MemoryTracker(GPU_WORKSPACES if is_gpu else {}, answer=batch == 1 and not is_packed)
        stack.enter_context(fake)
        follow_training(trainer, tracker)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return StepMemory(tracker.find_peak(WORKSPACE), tracker.find_largest(LOSS), trainable, 0)


def choose_planned_precision(recipe: Recipe, is_gpu: bool, has_bf16: bool) -> Precision:
    """Return the precision that a run would choose on the machine that is planned for, not on this one.

    float16 is planned as bfloat16, which has the same size and which a CPU can autocast to.
    """
    trains_all, dtype = recipe.adapter.kind == "none", recipe.model.dtype
    cpu = torch.device("cpu")
    if not is_gpu:
        return choose_precision(dtype, cpu, trains_all)
    if trains_all and (dtype in ("auto", "float16") or not has_bf16):
        return Precision(torch.float32, "bf16")
    return choose_precision("float32" if dtype == "float32" else "bfloat16", cpu, trains_all)


def _keep_options(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's options without those that need the machine it will run on."""
    return {key: value for key, value in recipe.trainer.items() if key not in ("activation_offloading", "tf32")}


def _keep_gradients(trainer: Trainer) -> None:
    """Let the second step begin as the later batches of an accumulated one do: with gradients there."""
    trainer.model.zero_grad = lambda set_to_none=True: None


def _prepare_quantization_tables() -> None:
    """Let bitsandbytes make its constant tables from real numbers, before tensors have no content."""
    quantization.quantize_blockwise(torch.zeros(256))
