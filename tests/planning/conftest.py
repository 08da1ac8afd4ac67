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
from finetune.models.streaming.from_main_memory import stream_layers
from finetune.planning.step.dry_model import make_full_rows, make_stand_in_tokenizer
from finetune.planning.step.step_parts import LOSS, WORKSPACE, follow_training
from finetune.planning.step.tracker import MemoryTracker, Peak
from finetune.training.trainer import build_trainer

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
    precision = choose_precision(
        recipe.recipe.model.dtype,
        torch.device("cpu"),
        recipe.trains_all_weights,
        keeps_masters=recipe.method.is_pretraining,
    )
    pretrains, section = recipe.method.is_pretraining, recipe.recipe.model
    base = find_base_folder(section.checkpoint, section.architecture)
    loaded = load_base(base, section, precision, torch.device("cpu"), recipe.method.head)
    model = attach_adapter(loaded, recipe.recipe.adapter, base)
    if section.stream_layers:
        stream_layers(model, torch.device("cpu"))
    rows = make_full_rows(recipe)
    train = concatenate_datasets([rows.train] * recipe.recipe.trainer.get("gradient_accumulation_steps", 1))
    if recipe.recipe.trainer.get("per_device_train_batch_size", 8) > 1 and not pretrains:  # whose rows are packed full
        columns = {
            name: [
                row[: len(row) - number % 2] if isinstance(row, list) else row for number, row in enumerate(train[name])
            ]
            for name in train.column_names
        }
        train = train.from_dict(columns)
    options = {**recipe.recipe.trainer, **QUIET}
    rows = replace(rows, train=train)
    return build_trainer(recipe.change(trainer=options), model, make_stand_in_tokenizer(), rows, precision)


def set_batch(recipe, batch, accumulation):
    """Return a recipe with this micro-batch size and this many micro-batches a step."""
    return recipe.change_trainer(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)


def measure_run(recipe):
    """Train two real steps on the CPU and return their memory."""
    tracker = MemoryTracker()
    follow_training(build_real_trainer(recipe), tracker)
    return Measured(tracker.find_peak(WORKSPACE), tracker.find_largest(LOSS))
