"""Predict the peak memory of a recipe's training step: the real step, on tensors that have a shape and no content."""

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes import functional as quantization
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes as no_dispatch
from transformers import PreTrainedModel, Trainer

from finetune.models.engine import Engine
from finetune.models.precision import Precision, choose_planned_precision
from finetune.planning.changes import is_packed
from finetune.planning.step.dry_model import build_dry_model, find_model_config, make_full_rows, make_stand_in_tokenizer
from finetune.planning.step.kernels import (
    CHEAPER_VIEW,
    GPU_WORKSPACES,
    MASKED_SELECTION,
    OffloadedActivations,
    allocate_as_gpu,
    answer_truths,
    build_masks_as_in_run,
    leave_adapters_in_place,
    take_reference_as_known,
)
from finetune.planning.step.sharing import Sharing
from finetune.planning.step.stages import (
    LOSS,
    OPTIMIZER,
    WORKSPACE,
    follow_training,
    list_weights,
    make_optimizer_states,
)
from finetune.planning.step.tracker import MemoryTracker, Peak
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.trainer import build_trainer

# A dry run writes nothing, evaluates nothing and says nothing.
_DRY_OPTIONS: Mapping[str, Any] = {
    "max_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    # TRL's own needs the device that it moves from; ours takes its place.
    "activation_offloading": False,
    "tf32": None,
}


@dataclass(frozen=True)
class StepMemory:
    """The live tensors of a training step at their peak, and the most that the loss ever takes."""

    peak: Peak
    loss_bytes: int
    trainable: int


def measure_step(
    resolved: ResolvedRecipe, is_gpu: bool, has_bf16: bool = True, engine: Engine = "one", processes: int = 1
) -> StepMemory:
    """Run a step of a recipe without content and return its memory on a GPU, or on a CPU; of one process, where it is many.

    It is a later step: optimizer states are there and, where a run accumulates, gradients, as for all but the first batch.

    Raises:
        FinetuneError: the start's sizes cannot be found, or the recipe cannot be trained.
    """
    precision = choose_planned_precision(resolved, is_gpu, has_bf16, engine)
    config = find_model_config(resolved)
    quantization.quantize_blockwise(torch.zeros(256))  # its constant tables need real numbers, once
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(build_masks_as_in_run())
        stack.enter_context(leave_adapters_in_place())
        stack.enter_context(take_reference_as_known())
        if is_gpu:
            stack.enter_context(allocate_as_gpu())
        model = build_dry_model(resolved, config, precision, fake)
        stack.enter_context(fake)
        trainer = _build_dry_trainer(resolved, model, precision, folder)
        sharing = Sharing(engine, processes, 4 if precision == Precision(torch.float32, "no") else 2)
        tracker = _make_tracker(resolved, is_gpu, sharing)
        accumulates = read_accumulation(resolved.recipe) > 1
        prepare = functools.partial(make_optimizer_states, keep_gradients=accumulates)
        # What a plan takes for a CPU is the GPU that pages.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        follow_training(trainer, tracker, prepare)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    peak = tracker.find_peak(WORKSPACE, sharing.list_extras(model))
    if sharing.shares_weights:
        peak = max(peak, _measure_loading(model), key=lambda moment: moment.bytes)
    return StepMemory(peak, tracker.find_largest(LOSS), trainable)


def _measure_loading(model: PreTrainedModel | PeftModel) -> Peak:
    """Return the moment at which every process still has the whole model that it will keep a share of."""
    parts: dict[str, int] = {}
    for part, tensor in list_weights(model):
        parts[part] = parts.get(part, 0) + tensor.untyped_storage().nbytes()
    return Peak(sum(parts.values()), parts, 0, "loading")


def _build_dry_trainer(
    resolved: ResolvedRecipe, model: PreTrainedModel | PeftModel, precision: Precision, folder: str
) -> Trainer:
    """Return the recipe's own trainer over full rows."""
    # States that a run goes on from have the sizes of fresh ones.
    optimizer = replace(resolved.recipe.optimizer, states="fresh")
    method = resolved.method
    known = read_trainer_options(method.config_module, method.config_class)
    options = {name: value for name, value in _DRY_OPTIONS.items() if name in known}
    dry = resolved.change_trainer(**options).change(optimizer=optimizer, output=folder)
    with no_dispatch():
        rows = make_full_rows(resolved)
    trainer = build_trainer(dry, model, make_stand_in_tokenizer(), rows, precision)
    trainer.data_collator = _collate_without_content(trainer.data_collator)
    if resolved.recipe.trainer.get("activation_offloading"):
        trainer.maybe_activation_offload_context = OffloadedActivations(model)
    with warnings.catch_warnings():
        # transformers counts the parameters of 8-bit optimizers by their addresses, which these have not.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        with no_dispatch():
            trainer.create_optimizer()
    trainer.model.zero_grad = lambda set_to_none=True: None  # the trainer would clear them as its first act
    return trainer


def _make_tracker(resolved: ResolvedRecipe, is_gpu: bool, sharing: Sharing) -> MemoryTracker:
    # What the program asks is whether a mask can be left out: whether a batch is one row, without padding or neighbours.
    is_one_row = read_batch(resolved.recipe) == 1 and not is_packed(resolved)
    substitutes = {**MASKED_SELECTION, **CHEAPER_VIEW, **answer_truths(is_one_row)}
    share = sharing.count_share if sharing.processes > 1 else None
    if is_gpu and resolved.recipe.optimizer.moments == "cpu":
        share = _leave_out_optimizer
    return MemoryTracker(GPU_WORKSPACES if is_gpu else {}, substitutes, share)


def _leave_out_optimizer(tensor: torch.Tensor, part: str) -> int:
    return 0 if part == OPTIMIZER else tensor.untyped_storage().nbytes()


def _collate_without_content(collate: Any) -> Any:
    """Return a collator that builds a real batch, and hands on its shapes."""

    def collate_shapes(rows: list[dict[str, Any]]) -> dict[str, Any]:
        with no_dispatch():
            batch = collate(rows)
        return {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    return collate_shapes
