"""Everything of a run that is fixed before its trainer is built."""

import logging
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from finetune.data.dataset import Splits, load_splits
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template, list_template_tokens
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter, continue_adapter, find_untrained_tokens
from finetune.models.precision import Precision
from finetune.models.reference_model import describe_reference
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe
from finetune.rewards.judge import BorrowingJudge, borrow_base, check_judge
from finetune.runs.lineage import Start, find_start
from finetune.train.pretraining.packed_training import find_states
from finetune.train.training_rows import read_data_settings
from finetune.yulan.states.optimizer_states import OptimizerStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """Everything of a run that is fixed before its trainer is built."""

    recipe: Recipe
    precision: Precision
    begin: Start
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    splits: Splits
    states: OptimizerStates | None


def prepare(recipe: Recipe, config: TrainingArguments, precision: Precision) -> Setup:
    # Downloads, folds and caches are made by one process; the others then find them.
    with config.main_process_first(desc="preparing the start"):
        begin = find_start(recipe.model)
        tokenizer = load_tokenizer(begin.tokenizer_folder)
        template = find_template(recipe.data.template, tokenizer)
        tokenizer.chat_template = template.source
        if recipe.rewards.judge.run:
            check_judge(recipe.rewards.judge.run, begin.base, template)
        states = find_states(recipe)
        splits = load_splits(read_data_settings(recipe), tokenizer, template, recipe.seed)
    reference = describe_reference(recipe, splits.report.train.rows)
    for note in (*template.notes, *splits.report.notes, *([reference] if reference else [])):
        logger.info("%s", note)
    return Setup(recipe, precision, begin, tokenizer, template, splits, states)


def build_model(
    start: Setup, config: TrainingArguments, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, BorrowingJudge | None]:
    """Return the model to train, and the judge that reads with the same base where the recipe names one."""
    recipe, judge = start.recipe, None
    set_seed(recipe.seed)  # a head for scores begins at random
    base = load_base(start.begin.base, recipe.model, start.precision, device, METHODS[recipe.method].head)
    _warn_of_untrained_tokens(start, base)
    if recipe.rewards.judge.run:
        pad_token, rows = int(start.tokenizer.pad_token_id), config.per_device_train_batch_size
        judge = borrow_base(base, recipe.rewards.judge.run, pad_token, rows)
    if start.begin.adapter is not None:
        return continue_adapter(base, recipe.adapter, start.begin.adapter), judge
    set_seed(recipe.seed)
    return attach_adapter(base, recipe.adapter, start.begin.base), judge


def _warn_of_untrained_tokens(start: Setup, base: PreTrainedModel) -> None:
    adapter = start.recipe.adapter
    control_tokens = list_template_tokens(start.tokenizer, start.template)
    untrained = set(find_untrained_tokens(base, control_tokens)) - set(adapter.train_tokens)
    if untrained and adapter.kind != "none":
        names = ", ".join(f"{start.tokenizer.convert_ids_to_tokens(token)} ({token})" for token in sorted(untrained))
        logger.warning(
            "these tokens of the template look untrained in this start: %s; to train their rows set adapter.train_tokens: %s",
            names,
            sorted(untrained),
        )
