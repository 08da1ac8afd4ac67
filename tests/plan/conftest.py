"""Real CPU runs under the tracker, to hold predictions against."""

from dataclasses import dataclass, replace

import pytest
import torch
from datasets import concatenate_datasets
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.check.recipes import load_recipe
from finetune.checkpoints.finding import find_base_folder
from finetune.files.resources import list_recipes
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter
from finetune.models.precision import choose_precision
from finetune.plan.step.dry_model import make_full_rows, make_stand_in_tokenizer
from finetune.plan.step.stages import LOSS, WORKSPACE, follow_training
from finetune.plan.step.tracker import MemoryTracker, Peak
from finetune.recipe.methods import METHODS
from finetune.train.journal.progress import MetricsWriter, ProgressBar
from finetune.train.trainer import build_trainer

QUIET = {"max_steps": 2, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}


@dataclass(frozen=True)
class Measured:
    peak: Peak
    loss_bytes: int


@pytest.fixture(scope="session")
def larger_start(tmp_path_factory):
    """A Llama folder of twice nano's width and depth, with a vocabulary that is not small beside it."""
    folder = tmp_path_factory.mktemp("larger")
    config = LlamaConfig(
        vocab_size=6000,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(tmp_path):
    def make(name, *overrides):
        return load_recipe(list_recipes()[name], ["model.checkpoint=nano", f"output={tmp_path / 'run'}", *overrides])

    return make


def build_real_trainer(recipe):
    """Build a run's trainer over rows that fill every batch: where a batch has several, every second is a token shorter."""
    pretrains = METHODS[recipe.method].pretraining is not None
    precision = choose_precision(
        recipe.model.dtype, torch.device("cpu"), recipe.adapter.kind == "none", keeps_masters=pretrains
    )
    base = find_base_folder(recipe.model.checkpoint, recipe.model.architecture)
    model = attach_adapter(
        load_base(base, recipe.model, precision, torch.device("cpu"), METHODS[recipe.method].head), recipe.adapter, base
    )
    rows = make_full_rows(recipe)
    train = concatenate_datasets([rows.train] * recipe.trainer.get("gradient_accumulation_steps", 1))
    if recipe.trainer.get("per_device_train_batch_size", 8) > 1 and not pretrains:  # whose rows are packed full
        columns = {
            name: [
                row[: len(row) - number % 2] if isinstance(row, list) else row for number, row in enumerate(train[name])
            ]
            for name in train.column_names
        }
        train = train.from_dict(columns)
    options = {**recipe.trainer, **QUIET}
    trainer = build_trainer(
        replace(recipe, trainer=options), model, make_stand_in_tokenizer(), replace(rows, train=train), precision
    )
    trainer.remove_callback(MetricsWriter)
    trainer.remove_callback(ProgressBar)
    return trainer


def measure_run(recipe):
    """Train two real steps on the CPU and return their memory."""
    tracker = MemoryTracker()
    follow_training(build_real_trainer(recipe), tracker)
    return Measured(tracker.find_peak(WORKSPACE), tracker.find_largest(LOSS))
