"""Pre-training and annealing on transformers' Trainer: packed rows, the model's own loss, our optimizer and schedule."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, Trainer, default_data_collator

from finetune.checkpoints.finding import find_states_folder
from finetune.data.dataset import Splits
from finetune.data.packing import PackedRows
from finetune.errors import RecipeError
from finetune.recipe.sections import Recipe
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.pretraining.optimizer import OptimizerFactory, make_groups
from finetune.training.pretraining.schedule import plan_schedule
from finetune.training.pretraining.state_loading import StatesLoader
from finetune.yulan.native.modeling import YuLanMiniForCausalLM
from finetune.yulan.states.optimizer_states import OptimizerStates, check_parameters, open_states

PRETRAINING_OPTIONS: Mapping[str, Any] = {
    "remove_unused_columns": False,
    "include_num_input_tokens_seen": "all",
}


def pack_splits(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the rows as the trainer takes them: full ones to train on, and all documents of those to evaluate on."""
    length, pad_token = recipe.data.max_tokens, int(tokenizer.pad_token_id)
    held = splits.evaluation
    return {
        "train_dataset": PackedRows(splits.train, length, pad_token),
        "eval_dataset": None if held is None else PackedRows(held, length, pad_token, keeps_last=True),
        "data_collator": default_data_collator,
    }


def find_states(resolved: ResolvedRecipe) -> OptimizerStates | None:
    """Open the states that a recipe goes on from, or return None for a fresh start.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    recipe, states = resolved.recipe, resolved.recipe.optimizer.states
    if not resolved.method.is_pretraining or states == "fresh":
        return None
    return open_states(find_states_folder(recipe.model.checkpoint) if states == "published" else Path(states))


def set_up_pretraining(trainer: Trainer, recipe: Recipe, states: OptimizerStates | None) -> None:
    """Give a trainer its optimizer, its schedule, its number of steps, and the states that it goes on from.

    Raises:
        RecipeError: rows are longer than the model's positions, or the schedule is over before the run begins.
        CheckpointError: the states are not those of this model.
    """
    positions = trainer.model.config.max_position_embeddings
    if recipe.data.max_tokens > positions:
        problem = f"data.max_tokens: {recipe.data.max_tokens:,} exceeds the {positions:,} positions of the checkpoint"
        raise RecipeError(
            "recipe", [f"{problem}; lower it, or extend the context by model.max_positions and rope_theta"]
        )
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    if isinstance(model, YuLanMiniForCausalLM):
        model.skips_logits = True  # nobody asks for them here: evaluation keeps losses only
    config = trainer.args
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    tokens_per_step = rows_per_step * recipe.data.max_tokens
    steps_of_data = math.ceil(len(trainer.train_dataset) / rows_per_step)
    schedule = plan_schedule(recipe.schedule, tokens_per_step, steps_of_data, states.step if states else 0)
    if config.max_steps <= 0:
        config.max_steps = schedule.steps
    if states is not None:
        check_parameters(states, trainer.model)
        trainer.add_callback(StatesLoader(states))
    groups = make_groups(trainer.model, recipe.optimizer) if states is None else states.groups
    factory = OptimizerFactory(groups, recipe.optimizer.moments)

    def make_optimizer(model: Any) -> Any:
        optimizer = factory.make(model)
        # The trainer makes its own schedule only where there is none.
        trainer.lr_scheduler = LambdaLR(optimizer, schedule.compute_factor)
        return optimizer

    trainer.optimizer_cls_and_kwargs = (lambda: make_optimizer, {})
