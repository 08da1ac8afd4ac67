"""Set up pre-training and annealing on transformers' Trainer: packed rows, optimizer, and learning-rate schedule."""

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
from finetune.errors import CheckpointError, RecipeError, describe_count
from finetune.files.safety.manifests import MANIFEST_FILE, find_damage
from finetune.recipe.sections import Recipe
from finetune.training.pretraining.head_watch import HeadWatch
from finetune.training.pretraining.optimizer import OptimizerFactory, make_groups
from finetune.training.pretraining.packed_documents import keep_documents_apart
from finetune.training.pretraining.schedule import plan_schedule
from finetune.training.pretraining.state_loading import StatesLoader
from finetune.training.training_rows import count_step_rows
from finetune.yulan.native.modeling import YuLanMiniForCausalLM
from finetune.yulan.native.native_loss import ZTerms
from finetune.yulan.states.optimizer_states import RESULT, OptimizerStates, check_parameters, open_states

PRETRAINING_OPTIONS: Mapping[str, Any] = {
    "remove_unused_columns": False,
    "include_num_input_tokens_seen": "all",
}


def pack_splits(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the trainer's data sets and collator: only full rows are trained on, and all held-out documents are evaluated."""
    length, pad_token = recipe.data.max_tokens, int(tokenizer.pad_token_id)
    held = splits.evaluation
    return {
        "train_dataset": PackedRows(splits.train, length, pad_token),
        "eval_dataset": None if held is None else PackedRows(held, length, pad_token, keeps_last=True),
        "data_collator": default_data_collator,
    }


def find_states(recipe: Recipe) -> OptimizerStates | None:
    """Open the optimizer state that a recipe continues from, or return None where it begins without one.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    states = recipe.optimizer.states
    if states == "fresh":
        return None
    folder = find_states_folder(recipe.model.checkpoint) if states == "published" else Path(states)
    for place in (folder, folder / RESULT):
        # Published states have no manifest; those that a run has saved have one.
        if (place / MANIFEST_FILE).is_file() and (damage := find_damage(place)) is not None:
            raise CheckpointError(
                f"{place}: is not as it was written: {damage}; restore it, or set optimizer.states: fresh"
            )
    return open_states(folder)


def set_up_pretraining(trainer: Trainer, recipe: Recipe, states: OptimizerStates | None) -> None:
    """Set a trainer's optimizer, schedule and number of steps, and load the optimizer state that it continues from.

    Raises:
        RecipeError: rows are longer than the model's positions, or the schedule ends before the run begins.
        CheckpointError: the optimizer state is of another model.
    """
    _check_positions(trainer, recipe)
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    if isinstance(model, YuLanMiniForCausalLM):
        model.skips_logits = True  # evaluation keeps losses only
        model.z_terms = ZTerms()
    keep_documents_apart(model)
    trainer.add_callback(HeadWatch())
    config = trainer.args
    effective_batch = count_step_rows(config)
    tokens_per_step = effective_batch * recipe.data.max_tokens
    steps_of_data = math.ceil(len(trainer.train_dataset) / effective_batch)
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
        # The trainer makes a schedule only where there is none yet.
        trainer.lr_scheduler = LambdaLR(optimizer, schedule.compute_factor)
        return optimizer

    trainer.optimizer_cls_and_kwargs = (lambda: make_optimizer, {})


def _check_positions(trainer: Trainer, recipe: Recipe) -> None:
    positions = trainer.model.config.max_position_embeddings
    if recipe.data.max_tokens > positions:
        problem = f"data.max_tokens: {recipe.data.max_tokens:,} exceeds the {describe_count(positions, 'position')} of the checkpoint"
        raise RecipeError(
            "recipe", [f"{problem}; lower it, or extend the context by model.max_positions and rope_theta"]
        )
