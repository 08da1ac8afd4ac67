"""Build the trainer of a recipe's method: pass its options through, and decide what the kit owns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from finetune.compat import load_trainer_class, narrow_logit_tiles, skip_row_preparation
from finetune.data.dataset import Splits
from finetune.errors import RecipeError
from finetune.models.engine import find_engine, let_cpu_shard, set_shared_type
from finetune.models.precision import Precision
from finetune.models.reference_model import settle_reference
from finetune.recipe.batches import KIT_OPTIONS, read_batch
from finetune.rewards.judge import BorrowingJudge
from finetune.rewards.reward_functions import AnswerRewards, CompletionWriter, list_weights
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.journal.progress import MetricsWriter, ProgressBar
from finetune.training.online import PromptOrder
from finetune.training.preference.prepared_rows import (
    adapt_collator,
    choose_rows,
    make_collator,
)
from finetune.training.preference.watch import PreferenceWatch
from finetune.training.pretraining.packed_training import PRETRAINING_OPTIONS, pack_splits, set_up_pretraining
from finetune.yulan.states.optimizer_states import OptimizerStates

_RENAMED_OPTIONS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@dataclass(frozen=True)
class Aids:
    """What some methods need beside model and rows: the states that a pre-training goes on from, the judge of answers."""

    states: OptimizerStates | None = None
    judge: BorrowingJudge | None = None


NO_AIDS = Aids()


def build_trainer(
    resolved: ResolvedRecipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    precision: Precision,
    aids: Aids = NO_AIDS,
) -> Trainer:
    """Return the method's trainer over rows that are tokens already.

    Raises:
        RecipeError: TRL or transformers refuses a combination of options.
    """
    narrow_logit_tiles()
    recipe, method = resolved.recipe, resolved.method
    trainer_class = load_trainer_class(method.trainer_module, method.trainer_class)
    if method.shape in ("pair", "labelled"):
        trainer_class = skip_row_preparation(trainer_class)
    config = make_config(resolved, splits.evaluation is not None, precision)
    score = None if aids.judge is None else aids.judge.score
    rewards = AnswerRewards(recipe.rewards, model.generation_config.eos_token_id, score) if method.is_online else None
    start, pad_token = _copy_adapter(model), int(tokenizer.pad_token_id)
    try:
        trainer: Trainer = trainer_class(
            model=model,
            args=config,
            processing_class=tokenizer,
            **(
                pack_splits(recipe, splits, tokenizer)
                if method.is_pretraining
                else _choose_rows(splits, resolved, pad_token)
            ),
            **({} if rewards is None else {"reward_funcs": rewards.make_functions()}),
        )
    except (ValueError, NotImplementedError) as error:
        raise RecipeError("trainer", [str(error)]) from error
    _restore_parameters(model, start)
    set_shared_type(trainer, precision.shared)
    if not method.collator_class:
        trainer.data_collator = adapt_collator(method, trainer.data_collator)
    if isinstance(model, PeftModel):
        settle_reference(model, drop=resolved.adapter_starts_empty)
    if method.is_pretraining:
        set_up_pretraining(trainer, recipe, aids.states)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if method.shape in ("pair", "labelled") and method.head == "language":
        trainer.add_callback(PreferenceWatch(method.has_reference))
    if rewards is not None:
        trainer.add_callback(CompletionWriter(resolved.output, rewards))
        if config.shuffle_dataset:
            trainer.add_callback(PromptOrder())
    return trainer


def add_journal(trainer: Trainer, run: Path) -> None:
    """Show a progress bar, and write every logged step into the run directory."""
    trainer.add_callback(ProgressBar())
    trainer.add_callback(MetricsWriter(run))


def make_config(resolved: ResolvedRecipe, evaluates: bool, precision: Precision) -> TrainingArguments:
    """Return the trainer's configuration for a recipe.

    Raises:
        RecipeError: a combination of options that transformers refuses.
    """
    recipe, method = resolved.recipe, resolved.method
    options = {key: value for key, value in recipe.trainer.items() if key not in KIT_OPTIONS}
    # transformers 5 renamed these, and warns of TRL's own default under the old name; people know the old one.
    for old, new in _RENAMED_OPTIONS.items():
        if old in options:
            options[new] = options.pop(old)
    options.setdefault("activation_checkpointing", True)
    # Both follow from the machine and from our own bar; transformers' defaults would warn, and hide the bar.
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    options.setdefault("disable_tqdm", False)
    if find_engine() == "fsdp2":
        # Otherwise every process keeps whole gradients until the last batch of a step.
        options.setdefault("accelerator_config", {"gradient_accumulation_kwargs": {"sync_each_batch": True}})
    options.setdefault("use_cpu", not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    if evaluates:
        options.setdefault("eval_strategy", "epoch")
        # Never larger than in training, where it is known to fit.
        options.setdefault("per_device_eval_batch_size", read_batch(recipe))
    owned: dict[str, Any] = {
        **(PRETRAINING_OPTIONS if method.is_pretraining else _list_row_options(resolved)),
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": precision.autocast == "bf16",
        "fp16": precision.autocast == "fp16",
        "prediction_loss_only": True,
        # Otherwise a NaN would be averaged away in the log, and the run would go on with broken weights.
        "logging_nan_inf_filter": False,
    }
    config_class = load_trainer_class(method.config_module, method.config_class)
    try:
        config: TrainingArguments = config_class(**options, **owned)
    except (ValueError, TypeError) as error:
        raise RecipeError("trainer", [str(error)]) from error
    let_cpu_shard(config)
    return config


def _list_row_options(resolved: ResolvedRecipe) -> dict[str, Any]:
    """Rows arrive as tokens, cut by our own rule; TRL only packs them, which needs the length of a pack."""
    recipe = resolved.recipe
    if resolved.method.is_online:
        return {"reward_weights": list(list_weights(recipe.rewards).values())}
    packs = bool(recipe.trainer.get("packing"))
    if resolved.method.shape != "sequence":
        # Nothing is cut by it; ORPO and CPO would only warn of a default of their own without it.
        return {"max_length": recipe.data.max_tokens, "remove_unused_columns": False}
    length = {"max_length": recipe.data.max_tokens if packs else None}
    return {**length, "dataset_kwargs": None if packs else {"skip_prepare_dataset": True}}


def _choose_rows(splits: Splits, resolved: ResolvedRecipe, pad_token: int) -> dict[str, Any]:
    method, seed, held = resolved.method, resolved.recipe.seed, splits.evaluation
    collator = make_collator(method, pad_token)
    return {
        "train_dataset": choose_rows(splits.train, method, seed),
        "eval_dataset": None if held is None else choose_rows(held, method, seed),
        # KTO needs it within the constructor already, where the reference model's log-probabilities may be computed.
        **({} if collator is None else {"data_collator": collator}),
    }


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
