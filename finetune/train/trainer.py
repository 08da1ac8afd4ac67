"""Build TRL's trainer for a recipe: pass its options through, and decide what the kit owns."""

import importlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from trl.trainer import utils as trainer_utils

from finetune.data.dataset import Splits
from finetune.errors import RecipeError
from finetune.recipe import Recipe
from finetune.train.judging import CompletionWriter, Judge, list_weights
from finetune.train.methods import METHODS
from finetune.train.model import Precision
from finetune.train.progress import MetricsWriter, ProgressBar

# TRL computes the loss from tiles of 4,096 tokens by this many entries of the vocabulary, and holds one tile. Its own
# width of 32,768 makes 268 MB of it whatever the vocabulary; a quarter of that is still wide enough for a matrix product.
LOGIT_COLUMNS = 8192
trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE = LOGIT_COLUMNS

_MODEL_COLUMNS = ("input_ids", "labels")
_PROMPT_COLUMNS = ("prompt", "answer", "origin")
_RENAMED_OPTIONS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def build_trainer(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    precision: Precision,
    judge: Judge | None = None,
) -> Trainer:
    """Return the method's TRL trainer over rows that are tokens already, or over prompts whose answers are judged.

    Raises:
        RecipeError: TRL or transformers refuses a combination of options.
    """
    method = METHODS[recipe.method]
    trainer_class = getattr(importlib.import_module("trl"), method.trainer_class)
    config = make_config(recipe, splits.evaluation is not None, precision)
    rewards = {} if judge is None else {"reward_funcs": judge.make_functions()}
    start = _copy_adapter(model)
    try:
        trainer: Trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=keep_columns(splits.train, recipe.method),
            eval_dataset=keep_columns(splits.evaluation, recipe.method) if splits.evaluation is not None else None,
            processing_class=tokenizer,
            **rewards,
        )
    except ValueError as error:
        raise RecipeError("trainer", [str(error)]) from error
    _restore_parameters(model, start)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar())
    trainer.add_callback(MetricsWriter(Path(recipe.output)))
    if judge is not None:
        trainer.add_callback(CompletionWriter(Path(recipe.output), judge))
    return trainer


def make_config(recipe: Recipe, evaluates: bool, precision: Precision) -> TrainingArguments:
    """Return TRL's configuration for a recipe.

    Raises:
        RecipeError: a combination of options that transformers refuses.
    """
    method = METHODS[recipe.method]
    options = dict(recipe.trainer)
    packs = bool(options.get("packing"))
    # transformers 5 renamed these, and warns of TRL's own default under the old name; people know the old one.
    for old, new in _RENAMED_OPTIONS.items():
        if old in options:
            options[new] = options.pop(old)
    options.setdefault("activation_checkpointing", True)
    # Both follow from the machine and from our own bar; transformers' defaults would warn, and hide the bar.
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    options.setdefault("disable_tqdm", False)
    options.setdefault("use_cpu", not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    if evaluates:
        options.setdefault("eval_strategy", "epoch")
        # Never larger than in training, where it is known to fit.
        options.setdefault("per_device_eval_batch_size", options.get("per_device_train_batch_size", 8))
    owned: dict[str, Any] = {
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": precision.autocast == "bf16",
        "fp16": precision.autocast == "fp16",
        # Rows arrive as tokens, cut by our own rule; TRL only packs them, which needs the length of a pack.
        "prediction_loss_only": True,
        # Otherwise a NaN would be averaged away in the log, and the run would go on with broken weights.
        "logging_nan_inf_filter": False,
        **_own_rows(recipe, packs),
    }
    config_class = getattr(importlib.import_module(method.config_module), method.config_class)
    try:
        config: TrainingArguments = config_class(**options, **owned)
    except (ValueError, TypeError) as error:
        raise RecipeError("trainer", [str(error)]) from error
    return config


def _own_rows(recipe: Recipe, packs: bool) -> dict[str, Any]:
    if METHODS[recipe.method].row_kind == "prompt":
        return {"reward_weights": list_weights(recipe.rewards)}
    return {
        "max_length": recipe.data.max_tokens if packs else None,
        "dataset_kwargs": None if packs else {"skip_prepare_dataset": True},
    }


def keep_columns(rows: Dataset, method: str) -> Dataset:
    """Return rows with the columns that the method's trainer is given."""
    return rows.select_columns(list(_PROMPT_COLUMNS if METHODS[method].row_kind == "prompt" else _MODEL_COLUMNS))


def _copy_adapter(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return copies of an adapter's parameters; a model that is trained in full is left alone, and has none."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _restore_parameters(model: PreTrainedModel | PeftModel, start: dict[str, torch.Tensor]) -> None:
    """Give the adapter back the float32 values that it had before TRL rounded it to bfloat16.

    TRL casts the adapters of quantized bases. Steps of a usual size are smaller than half a bfloat16 step of
    the weight, so most of them would be lost.
    """
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data = start[name].to(parameter.device)
