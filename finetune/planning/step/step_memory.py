"""Predict the peak memory of a recipe's training step by running it on tensors that have a shape and no content."""

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
from transformers import PreTrainedModel, Trainer

from finetune.compat import (
    answer_autocast_as_gpu,
    build_masks_as_in_run,
    keep_gradients,
    leave_adapters_in_place,
    leave_all_modes,
    load_fake_tensors,
    replace_offloading,
    take_reference_as_known,
)
from finetune.models.engine import ENGINES, Engine
from finetune.models.precision import Precision, choose_planned_precision
from finetune.planning.changes import is_packed
from finetune.planning.step.dry_model import (
    build_dry_model,
    find_model_config,
    make_full_rows,
    make_stand_in_tokenizer,
    stream_dry_layers,
)
from finetune.planning.step.kernels import (
    CACHED_VIEW,
    GPU_WORKSPACES,
    MASKED_SELECTION,
    REPEATABLE_WORKSPACES,
    OffloadedActivations,
    allocate_as_gpu,
    answer_item_calls,
)
from finetune.planning.step.sharing import Sharing
from finetune.planning.step.step_parts import (
    LOSS,
    OPTIMIZER,
    WORKSPACE,
    follow_training,
    list_weights,
    make_optimizer_states,
    may_use_flash,
)
from finetune.planning.step.tracker import MemoryTracker, Peak
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.trainer import build_trainer

# A dry run writes nothing, evaluates nothing and logs nothing.
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
    # TRL's offloading needs a GPU; `OffloadedActivations` takes its place.
    "activation_offloading": False,
    "tf32": None,
}
# Parts of the main memory.
STREAMED, OFFLOADED = "streamed layers", "offloaded activations"


@dataclass(frozen=True)
class StepMemory:
    """The peak of a training step, the most bytes that the loss ever takes, and the number of trained parameters.

    `main_memory` is what waits in the host's memory for a device of its own: part -> bytes.
    """

    peak: Peak
    loss_bytes: int
    trainable: int
    main_memory: Mapping[str, int]


def measure_step(
    resolved: ResolvedRecipe, is_gpu: bool, has_bf16: bool = True, engine: Engine = "one", processes: int = 1
) -> StepMemory:
    """Run a training step without content and return the memory that one process needs for it on a GPU, or on a CPU.

    It is a later step of a run: the optimizer's moments exist, and gradients too where the run accumulates them.

    Raises:
        FinetuneError: the sizes of the base checkpoint cannot be found, or the recipe cannot be trained.
    """
    precision = choose_planned_precision(resolved, is_gpu, has_bf16, engine)
    config = find_model_config(resolved)
    quantization.quantize_blockwise(torch.zeros(256))  # builds its constant tables from real numbers, once
    _, make_mode = load_fake_tensors()
    fake = make_mode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        _enter_patches(stack, resolved, is_gpu)
        model = build_dry_model(resolved, config, precision, fake)
        loading = _measure_loading(model) if _loads_whole(resolved, engine) else None
        main_memory = {STREAMED: stream_dry_layers(model, fake)} if resolved.recipe.model.stream_layers else {}
        offloading = OffloadedActivations(model)
        stack.enter_context(fake)
        trainer = _build_dry_trainer(resolved, model, precision, folder)
        if resolved.recipe.trainer.get("activation_offloading"):
            replace_offloading(trainer, offloading)
        sharing = Sharing(engine, processes, 4 if precision == Precision(torch.float32, "no") else 2)
        tracker = _make_tracker(resolved, is_gpu, sharing)
        accumulates = read_accumulation(resolved.recipe) > 1
        prepare = functools.partial(make_optimizer_states, keep_gradients=accumulates)
        follow_training(trainer, tracker, prepare)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    peak = tracker.find_peak(WORKSPACE, sharing.list_extras(model))
    if loading is not None:
        peak = max(peak, loading, key=lambda moment: moment.bytes)
    if offloading.most_away:
        main_memory[OFFLOADED] = offloading.most_away
    return StepMemory(peak, tracker.find_largest(LOSS), trainable, main_memory)


def _loads_whole(resolved: ResolvedRecipe, engine: Engine) -> bool:
    """Tell whether the whole base is on the device before training, and only a part of it later.

    A base that is streamed and not quantized is loaded into main memory.
    """
    model = resolved.recipe.model
    return ENGINES[engine].shards_weights or (model.stream_layers and model.quantize != "none")


def _enter_patches(stack: contextlib.ExitStack, resolved: ResolvedRecipe, is_gpu: bool) -> None:
    """Let the libraries run a step on tensors without content, and with the memory of a GPU, until the stack is closed."""
    method = resolved.method
    stack.enter_context(build_masks_as_in_run())
    stack.enter_context(leave_adapters_in_place())
    if columns := method.reference_columns:
        stack.enter_context(take_reference_as_known(method.trainer_module, method.trainer_class, columns))
    if is_gpu:
        stack.enter_context(allocate_as_gpu())
        stack.enter_context(answer_autocast_as_gpu())
    # The dry run computes on a CPU in place of a GPU, which can page.
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")


def _measure_loading(model: PreTrainedModel | PeftModel) -> Peak:
    """Return the memory while loading, when a process still holds the whole model before it is sharded or streamed."""
    parts: dict[str, int] = {}
    for part, tensor in list_weights(model):
        parts[part] = parts.get(part, 0) + tensor.untyped_storage().nbytes()
    return Peak(sum(parts.values()), parts, 0, "loading")


def _build_dry_trainer(
    resolved: ResolvedRecipe, model: PreTrainedModel | PeftModel, precision: Precision, folder: str
) -> Trainer:
    """Return the recipe's own trainer over rows that are all full."""
    # Moments that a run continues from have the sizes of fresh ones, so none are read.
    optimizer = replace(resolved.recipe.optimizer, states="fresh")
    method = resolved.method
    known = read_trainer_options(method.config_module, method.config_class)
    options = {name: value for name, value in _DRY_OPTIONS.items() if name in known}
    dry = resolved.change_trainer(**options).change(optimizer=optimizer, output=folder)
    with leave_all_modes():
        rows = make_full_rows(resolved)
    trainer = build_trainer(dry, model, make_stand_in_tokenizer(), rows, precision)
    trainer.data_collator = _collate_without_content(trainer.data_collator)
    with warnings.catch_warnings():
        # transformers counts the parameters of 8-bit optimizers by their addresses, which tensors without content lack.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        with leave_all_modes():
            trainer.create_optimizer()
    keep_gradients(trainer.model)
    return trainer


def _make_tracker(resolved: ResolvedRecipe, is_gpu: bool, sharing: Sharing) -> MemoryTracker:
    # transformers asks a bool tensor whether the mask can be left out: yes for a single row without padding or packed neighbours.
    is_one_row = read_batch(resolved.recipe) == 1 and not is_packed(resolved)
    substitutes = {**MASKED_SELECTION, **CACHED_VIEW, **answer_item_calls(is_one_row)}
    share = sharing.count_share if sharing.processes > 1 else None
    if is_gpu and resolved.recipe.optimizer.moments == "cpu":
        share = _leave_out_optimizer
    workspaces = REPEATABLE_WORKSPACES if may_use_flash(resolved) else GPU_WORKSPACES
    return MemoryTracker(workspaces if is_gpu else {}, substitutes, share)


def _leave_out_optimizer(tensor: torch.Tensor, part: str) -> int:
    return 0 if part == OPTIMIZER else tensor.untyped_storage().nbytes()


def _collate_without_content(collate: Any) -> Any:
    """Return a collator that builds a real batch and replaces its tensors by empty ones of the same shapes."""

    def collate_shapes(rows: list[dict[str, Any]]) -> dict[str, Any]:
        with leave_all_modes():
            batch = collate(rows)
        return {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    return collate_shapes
