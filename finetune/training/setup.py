"""Prepare what a run needs before its trainer is built: base checkpoint, tokenizer, template, rows, and the model to train."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.data.dataset import Splits
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template, list_stop_tokens, list_template_tokens
from finetune.files.folders import check_links
from finetune.models.adapters.beginnings import BeginningInputs, prepare_beginning
from finetune.models.adapters.row_texts import RowTexts
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter, continue_adapter, find_untrained_tokens
from finetune.models.precision import Precision
from finetune.models.reference_model import describe_reference
from finetune.models.streaming.from_main_memory import stream_layers
from finetune.rewards.judge import BorrowingJudge, borrow_base, check_judge
from finetune.runs.lineage import find_tokenizer_folder, find_training_base
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.run_files import PISSA_START_FOLDER
from finetune.runs.trained_tokens import open_tokenizer
from finetune.training.online import bind_template, set_stop_tokens
from finetune.training.pretraining.packed_training import find_states
from finetune.training.training_rows import load_rows
from finetune.yulan.states.optimizer_states import OptimizerStates
from finetune.yulan.tokenizer_files import describe_lost_legacy, make_tokenizer_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a run trains from and on.

    `base` is the folder of weights and `base_fingerprint` the hash of its content, `states` the optimizer state that it continues
    from. `tokenizer_files` are the files of `tokenizer` as a result gets them. Both are read before step 1, since the folders may
    be gone when the run ends.
    """

    resolved: ResolvedRecipe
    precision: Precision
    base: Path
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    splits: Splits
    states: OptimizerStates | None
    base_fingerprint: str
    tokenizer_files: Mapping[str, bytes]

    @property
    def rows_fingerprint(self) -> str:
        """The hash of all rows and of the split into trained and held-out ones."""
        return self.splits.report.fingerprint

    @property
    def sample_rows(self) -> Dataset:
        """The held-out rows, or the training rows where none are held out."""
        return self.splits.train if self.splits.evaluation is None else self.splits.evaluation


@dataclass(frozen=True)
class TrainedModel:
    """The model to train, the tokenizer that its trainer uses, and the reward model that shares its base, if any."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    judge: BorrowingJudge | None


def prepare(resolved: ResolvedRecipe, config: TrainingArguments, precision: Precision) -> Setup:
    """Find the base checkpoint, open tokenizer and template, and prepare the rows.

    Raises:
        FinetuneError: one of them cannot be found or used.
    """
    recipe = resolved.recipe
    # The first process downloads, folds and fills the caches; the others wait and read them.
    with config.main_process_first(desc="preparing the base checkpoint and the rows"):
        base = find_training_base(resolved)
        tokenizer = open_tokenizer(resolved.earlier, base)
        template = find_template(recipe.data.template, tokenizer)
        tokenizer.chat_template = template.source
        if recipe.rewards.judge.run:
            check_judge(recipe.rewards.judge.run, base, template)
        states = find_states(recipe) if resolved.method.is_pretraining else None
        splits = load_rows(resolved, base, tokenizer, template)
    reference = describe_reference(resolved, splits.report.train.rows) if resolved.method.has_reference else None
    for note in (*template.notes, *splits.report.notes, *([reference] if reference else [])):
        logger.info("%s", note)
    fingerprint = fingerprint_checkpoint(base)
    folder = find_tokenizer_folder(resolved.earlier, base)
    if (lost := describe_lost_legacy(folder)) is not None:
        logger.warning("%s: %s", folder, lost)
    check_links(folder)
    files = make_tokenizer_files(folder, template.source)  # as they are written into a result
    return Setup(resolved, precision, base, tokenizer, template, splits, states, fingerprint, files)


def build_model(
    setup: Setup, config: TrainingArguments, device: torch.device, *, resumes: bool = False
) -> TrainedModel:
    """Load the base model and attach its adapter; a reward model that the recipe names shares the same base.

    A run that `resumes` gets the trained values of its adapter from the checkpoint later.
    """
    resolved, recipe, judge = setup.resolved, setup.resolved.recipe, None
    set_seed(recipe.seed)  # the head of a reward model is initialized at random
    # bitsandbytes quantizes on the device, in its rounding; a 16-bit base need not pass through a device that it may not fit.
    loads_to_cpu = recipe.model.stream_layers and recipe.model.quantize == "none"
    loaded_to = torch.device("cpu") if loads_to_cpu else device
    base = load_base(setup.base, recipe.model, setup.precision, loaded_to, resolved.method.head)
    _warn_of_untrained_tokens(setup, base)
    if recipe.rewards.judge.run:
        pad_token, rows = int(setup.tokenizer.pad_token_id), config.per_device_train_batch_size
        judge = borrow_base(base, recipe.rewards.judge.run, pad_token, rows)
    if resolved.adapter_folder is not None:
        model: PreTrainedModel | PeftModel = continue_adapter(base, recipe.adapter, resolved.adapter_folder)
    else:
        set_seed(recipe.seed)
        texts = RowTexts(setup.splits.train, recipe.seed)
        initial = resolved.output / PISSA_START_FOLDER if resumes else None
        begin = prepare_beginning(base, recipe.adapter, BeginningInputs(setup.base, texts, initial))
        model = attach_adapter(base, recipe.adapter, setup.base)
        begin(model)
    if recipe.model.stream_layers:
        stream_layers(model, device)
    if not resolved.method.is_online:
        return TrainedModel(model, setup.tokenizer, judge)
    set_stop_tokens(model, list_stop_tokens(setup.tokenizer, setup.template))
    return TrainedModel(model, bind_template(setup.tokenizer, setup.template), judge)


def _warn_of_untrained_tokens(setup: Setup, base: PreTrainedModel) -> None:
    """Warn of the template's tokens whose embeddings look untrained and which the run will not train."""
    adapter = setup.resolved.recipe.adapter
    control_tokens = list_template_tokens(setup.tokenizer, setup.template)
    untrained = set(find_untrained_tokens(base, control_tokens)) - set(adapter.train_tokens)
    if untrained and not adapter.trains_all_weights:
        names = ", ".join(f"{setup.tokenizer.convert_ids_to_tokens(token)} ({token})" for token in sorted(untrained))
        logger.warning(
            "these tokens of the template look untrained in this base checkpoint: %s; to train their embeddings set "
            "adapter.train_tokens: %s",
            names,
            sorted(untrained),
        )
