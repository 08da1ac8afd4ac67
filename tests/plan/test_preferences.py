"""Plans of preference recipes: a pair is two texts, all logits are counted where TRL holds them, a run goes on from a run."""

import pytest

from finetune.check import load_recipe
from finetune.plan.answering import as_training_step
from finetune.plan.dry_model import read_sizes
from finetune.plan.memory import measure_step
from finetune.resources import list_recipes
from finetune.train.batches import read_batch

SMALL = ["model.checkpoint=nano", "data.max_tokens=128", "trainer.gradient_accumulation_steps=1"]


@pytest.mark.parametrize(("name", "texts"), [("dpo_qlora", 2), ("kto_qlora", 1), ("reward_qlora", 2)])
def test_a_preference_step_is_planned_as_its_texts(nano_llama, name, texts):
    recipe = load_recipe(list_recipes()[name], SMALL)
    step = as_training_step(recipe)
    assert step.method == "sft"
    assert read_batch(step) == texts * read_batch(recipe)
    assert (step.data.max_tokens, step.adapter, step.model) == (128, recipe.adapter, recipe.model)


def test_orpo_is_planned_with_all_logits(nano_llama):
    recipe = load_recipe(list_recipes()["orpo_qlora"], SMALL)
    assert as_training_step(recipe) is recipe
    vocabulary = int(read_sizes("nano")["vocab_size"])
    logits = 2 * 128 * vocabulary * 4  # of both sides of one pair, in float32
    assert measure_step(recipe, is_gpu=False).loss_bytes > 2 * logits


def test_a_run_has_the_sizes_of_its_base(tmp_path, nano_llama):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{nano_llama}"}}')
    assert read_sizes(str(tmp_path)) == read_sizes(str(nano_llama))
