"""Build the trainer of a recipe's method, with the recipe's options and those that the kit sets itself."""

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

from finetune.compat import load_trainer_class, narrow_logit_tiles, skip_row_preparation, use_one_gpu
from finetune.data.dataset import Splits
from finetune.models.engine import ENGINES, find_engine, let_cpu_shard, set_shared_type
from finetune.models.lora import raise_rate_of_b
from finetune.models.precision import Precision
from finetune.models.reference_model import settle_reference
from finetune.recipe.batches import EARLY_STOPPING, KIT_OPTIONS
from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import BATCH, NEWER_NAMES, read_split_option
from finetune.rewards.judge import BorrowingJudge
from finetune.rewards.reward_functions import AnswerRewards, CompletionWriter, list_weights
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.held_out_loss import average_over_rows, average_over_tokens
from finetune.training.journal.progress import (
    EarlyStopping,
    MetricsWriter,
    ProgressBar,
    ShortRunLogging,
    WholeCheckpoints,
)
from finetune.training.journal.reporters import guard_reporters
from finetune.training.journal.safeguards import add_safeguards
from finetune.training.observing.machine import MachineWriter
from finetune.training.observing.task_scores import include_task_scores
from finetune.training.online import PromptOrder
from finetune.training.option_trials import explain_refusal
from finetune.training.preference.prepared_rows import (
    adapt_collator,
    choose_rows,
    leave_out_lone_row,
    make_collator,
)
from finetune.training.preference.watch import PreferenceWatch
from finetune.training.pretraining.packed_training import PRETRAINING_OPTIONS, pack_splits, set_up_pretraining
from finetune.yulan.states.optimizer_states import OptimizerStates

# What TRL and transformers raise about their options. Other errors are faults of a program.
_REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError, KeyError, AssertionError)
_BETAS = frozenset({"adam_beta1", "adam_beta2"})


@dataclass(frozen=True)
class MethodInputs:
    """What some methods need besides model and rows: the optimizer state that pre-training continues from, the reward model."""

    states: OptimizerStates | None = None
    judge: BorrowingJudge | None = None


NO_INPUTS = MethodInputs()


def build_trainer(
    resolved: ResolvedRecipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    precision: Precision,
    inputs: MethodInputs = NO_INPUTS,
) -> Trainer:
    """Build the trainer of the recipe's method, over rows that are tokens already.

    Raises:
        RecipeError: TRL or transformers refuses a combination of options.
    """
    narrow_logit_tiles()
    method = resolved.method
    config = make_config(resolved, splits.evaluation is not None, precision)
    rewards = _make_rewards(resolved, model, inputs)
    adapter_before = _copy_adapter(model)
    try:
        trainer: Trainer = _find_trainer_class(method, asks_tasks=bool(resolved.recipe.data.tasks))(
            model=model,
            args=config,
            processing_class=tokenizer,
            **_list_rows(resolved, splits, tokenizer, rewards, config),
        )
    except _REFUSALS as error:
        raise explain_refusal(error, resolved.recipe.trainer) from error
    _restore_adapter(model, adapter_before)
    set_shared_type(trainer, precision.shared)
    if not method.collator_class:
        trainer.data_collator = adapt_collator(method, trainer.data_collator)
    if isinstance(model, PeftModel):
        settle_reference(model, drop=resolved.adapter_starts_empty)
    if method.is_pretraining:
        set_up_pretraining(trainer, resolved.recipe, inputs.states)
    elif (ratio := resolved.recipe.adapter.loraplus_ratio) is not None:
        raise_rate_of_b(trainer, ratio)
    _set_callbacks(trainer, resolved, rewards)
    return trainer


def _find_trainer_class(method: Method, *, asks_tasks: bool) -> Any:
    trainer_class = load_trainer_class(method.trainer_module, method.trainer_class)
    if asks_tasks:
        trainer_class = include_task_scores(trainer_class)
    if method.shape == "sequence":
        return average_over_tokens(trainer_class)
    if method.shape in ("pair", "labelled"):
        return average_over_rows(skip_row_preparation(trainer_class), method)
    return trainer_class


def _make_rewards(
    resolved: ResolvedRecipe, model: PreTrainedModel | PeftModel, inputs: MethodInputs
) -> AnswerRewards | None:
    if not resolved.method.is_online:
        return None
    score = None if inputs.judge is None else inputs.judge.score
    return AnswerRewards(resolved.recipe.rewards, model.generation_config.eos_token_id, score)


def _set_callbacks(trainer: Trainer, resolved: ResolvedRecipe, rewards: AnswerRewards | None) -> None:
    """Remove transformers' own displays, and add what the method needs."""
    method = resolved.method
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if method.shape in ("pair", "labelled") and method.head == "language":
        trainer.add_callback(PreferenceWatch(method.has_reference))
    if EARLY_STOPPING in resolved.recipe.trainer:
        trainer.add_callback(EarlyStopping(int(resolved.recipe.trainer[EARLY_STOPPING])))
    if rewards is not None:
        trainer.add_callback(CompletionWriter(resolved.output, rewards))
        if trainer.args.shuffle_dataset:
            trainer.add_callback(PromptOrder())


def add_journal(trainer: Trainer, run: Path, *, chooses_interval: bool = False) -> None:
    """Let the trainer show a progress bar, keep the run safe, and write every logged step into the run directory.

    `chooses_interval`: the recipe does not say how often to log, so that a short run may log more often.
    """
    guard_reporters(trainer)
    if chooses_interval:
        trainer.add_callback(ShortRunLogging())
    trainer.add_callback(WholeCheckpoints())
    add_safeguards(trainer)
    trainer.add_callback(MetricsWriter(run))
    trainer.add_callback(MachineWriter(run))
    trainer.add_callback(ProgressBar())  # after what they say of a run that goes on


def make_config(resolved: ResolvedRecipe, evaluates: bool, precision: Precision) -> TrainingArguments:
    """Make the trainer's configuration for a recipe.

    Raises:
        RecipeError: TRL or transformers refuses a combination of options.
    """
    recipe, method = resolved.recipe, resolved.method
    options = {key: value for key, value in recipe.trainer.items() if key not in KIT_OPTIONS}
    # transformers warns where TRL's defaults use the old name.
    for old, new in NEWER_NAMES.items():
        if old in options:
            options[new] = options.pop(old)
    for name in _BETAS.intersection(options):  # torch refuses a whole number, which YAML makes of `0`
        options[name] = float(options[name])
    _add_defaults(options, int(read_split_option(recipe.trainer, BATCH)) if evaluates else None)
    owned: dict[str, Any] = {
        **(PRETRAINING_OPTIONS if method.is_pretraining else _list_row_options(resolved)),
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": precision.autocast == "bf16",
        "fp16": precision.autocast == "fp16",
        "prediction_loss_only": True,
        # The filter would hide a NaN loss from the log, and the run would continue with broken weights.
        "logging_nan_inf_filter": False,
    }
    config_class = load_trainer_class(method.config_module, method.config_class)
    try:
        config: TrainingArguments = config_class(**options, **owned)
    except (*_REFUSALS, AttributeError, OSError, RuntimeError, ZeroDivisionError) as error:  # it only reads options
        raise explain_refusal(error, recipe.trainer) from error
    use_one_gpu(config)
    let_cpu_shard(config)
    return config


def _add_defaults(options: dict[str, Any], eval_batch: int | None) -> None:
    """Set the options that the recipe leaves open and whose own defaults do not suit the kit or the machine.

    `eval_batch` is the micro-batch size of the evaluation, or None where there is none.
    """
    options.setdefault("activation_checkpointing", True)
    # By default torch warns on a machine without a GPU, and the progress bar is hidden.
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    options.setdefault("disable_tqdm", False)
    engine = find_engine()
    if engine == "fsdp2":
        # Otherwise every process keeps whole gradients until the last batch of a step.
        options.setdefault("accelerator_config", {"gradient_accumulation_kwargs": {"sync_each_batch": True}})
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    # With `use_cpu` accelerate would take DDP in DeepSpeed's place, which finds the CPU by itself.
    options.setdefault("use_cpu", not (has_gpu or ENGINES[engine].is_deepspeed))
    if ENGINES[engine].is_deepspeed and not has_gpu:
        options.setdefault("ddp_backend", "gloo")
    if eval_batch is not None:
        options.setdefault("eval_strategy", "epoch")
        # No larger than the micro-batch size of training, which fits.
        options.setdefault("per_device_eval_batch_size", eval_batch)


def _list_row_options(resolved: ResolvedRecipe) -> dict[str, Any]:
    """Return the options about rows: the kit tokenizes and cuts them itself, and TRL may only pack them."""
    recipe = resolved.recipe
    if resolved.method.is_online:
        return {"reward_weights": list(list_weights(recipe.rewards).values())}
    packs = bool(recipe.trainer.get("packing"))
    if resolved.method.shape != "sequence":
        # No row is longer, so nothing is cut; without it ORPO and CPO warn that they use a default.
        return {"max_length": recipe.data.max_tokens, "remove_unused_columns": False}
    length = {"max_length": recipe.data.max_tokens if packs else None}
    return {**length, "dataset_kwargs": None if packs else {"skip_prepare_dataset": True}}


def _list_rows(
    resolved: ResolvedRecipe,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    rewards: AnswerRewards | None,
    config: TrainingArguments,
) -> dict[str, Any]:
    """Return the trainer's arguments about rows: data sets, collator and reward functions."""
    method, seed, held = resolved.method, resolved.recipe.seed, splits.evaluation
    if method.is_pretraining:
        return pack_splits(resolved.recipe, splits, tokenizer)
    collator = make_collator(method, int(tokenizer.pad_token_id))
    train = choose_rows(splits.train, method, seed)
    evaluated = None if held is None else choose_rows(held, method, seed)
    if config.world_size == 1:  # several processes fill up their last batches
        train = leave_out_lone_row(train, method, config.train_batch_size, "training")
        if evaluated is not None:
            evaluated = leave_out_lone_row(evaluated, method, config.eval_batch_size, "evaluation")
    return {
        "train_dataset": train,
        "eval_dataset": evaluated,
        # KTO's constructor may compute the reference model's log-probabilities, and needs the collator for it.
        **({} if collator is None else {"data_collator": collator}),
        **({} if rewards is None else {"reward_funcs": rewards.make_functions()}),
    }


def _copy_adapter(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return copies of an adapter's trained parameters, by name; none for a model without an adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _restore_adapter(model: PreTrainedModel | PeftModel, before: dict[str, torch.Tensor]) -> None:
    """Restore the float32 values that the adapter had before TRL rounded it to bfloat16.

    TRL casts the adapters of quantized base models. Most optimizer steps would then be lost: they are smaller than half the
    distance between two neighbouring bfloat16 numbers.
    """
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name].to(parameter.device)
