"""Plans of preference recipes run TRL's own trainers: against real runs, and with what a reference takes."""

import json

import pytest
import torch

from finetune.check.recipes import load_recipe, resolve_names
from finetune.cli.main import main
from finetune.files.resources import list_recipes
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter, save_adapter
from finetune.models.precision import Precision
from finetune.planning.duration import count_matrix_weights, count_work
from finetune.planning.forecast import Target, describe_plan, make_plan
from finetune.planning.step.dry_model import read_sizes
from finetune.planning.step.online_step import as_training_step
from finetune.planning.step.step_memory import measure_step
from finetune.planning.step.step_parts import ADAPTER, FROZEN_ADAPTER
from finetune.recipe.sections import ModelSection, Recipe
from finetune.runs.results import find_earlier
from finetune.yulan.layout import PUBLISHED_SIZES
from tests.planning.conftest import measure_run, set_batch

SMALL = ("data.max_tokens=128", "trainer.gradient_accumulation_steps=1")
ALL_WEIGHTS = ("adapter.kind=none", "model.quantize=none")
CASES = {
    "dpo-all-weights": ("dpo_lora", *ALL_WEIGHTS),  # what its reference gave is computed before
    "dpo-several-pairs": ("dpo_qlora", "trainer.per_device_train_batch_size=2"),
    "kto": ("kto_qlora", "trainer.gradient_checkpointing=false"),
    "kto-all-weights": ("kto_qlora", *ALL_WEIGHTS),
    "orpo": ("orpo_qlora",),
    "simpo": ("simpo_qlora", "model.quantize=none"),
    "reward": ("reward_qlora",),
    "reward-all-weights": ("reward_qlora", *ALL_WEIGHTS),
}


@pytest.mark.parametrize("case", CASES)
def test_prediction_matches_a_real_run(make_recipe, case):
    name, *overrides = CASES[case]
    recipe = make_recipe(name, *SMALL, *overrides)
    predicted, measured = measure_step(recipe, is_gpu=False), measure_run(recipe)
    assert predicted.peak.bytes == pytest.approx(measured.peak.bytes, rel=0.002)
    assert predicted.loss_bytes == pytest.approx(measured.loss_bytes, rel=0.001)
    assert sum(predicted.peak.parts.values()) == predicted.peak.bytes


def test_orpo_is_planned_with_all_logits(make_recipe):
    vocabulary = int(read_sizes(make_recipe("orpo_qlora"))["vocab_size"])
    logits = 2 * 128 * vocabulary * 4  # of both sides of one pair, in float32
    assert measure_step(make_recipe("orpo_qlora", *SMALL), is_gpu=False).loss_bytes > 2 * logits


def test_dpo_holds_no_logits_whole(make_recipe):
    """Of the real vocabulary, at 4,096 tokens a side: at most a tenth of the naive logits in float32."""
    recipe = make_recipe("dpo_qlora", "model.checkpoint=base", "data.max_tokens=4096")
    assert measure_step(recipe, is_gpu=True).loss_bytes <= 0.1 * 2 * 4096 * PUBLISHED_SIZES["vocab_size"] * 4


def test_a_run_has_the_sizes_of_its_base(tmp_path, nano_llama):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{nano_llama}"}}')
    found, base = (
        read_sizes(resolve_names(Recipe(model=ModelSection(checkpoint=str(folder))), find_earlier(str(folder))))
        for folder in (tmp_path, nano_llama)
    )
    assert found == base


def test_going_on_with_an_adapter_holds_a_frozen_copy_of_it(make_recipe, tmp_path, nano_llama):
    recipe = make_recipe("sft_lora")
    base = load_base(nano_llama, recipe.recipe.model, Precision(torch.float32, "no"), torch.device("cpu"))
    save_adapter(attach_adapter(base, recipe.recipe.adapter, nano_llama), tmp_path / "adapter")
    overrides = [f"model.checkpoint={tmp_path}", *SMALL]
    parts = measure_step(load_recipe(list_recipes()["dpo_lora"], overrides), is_gpu=False).peak.parts
    assert parts[FROZEN_ADAPTER] == parts[ADAPTER]


def test_work_counts_both_sides_and_the_reference(make_recipe):
    def count(name, *overrides):
        recipe = make_recipe(name, *SMALL, "adapter.train_tokens=[]", *overrides)
        return count_work(set_batch(recipe, 2, 3), PUBLISHED_SIZES)

    sft, orpo, dpo = count("sft_lora"), count("orpo_qlora"), count("dpo_lora")
    assert (sft.tokens, orpo.tokens, dpo.tokens) == (768, 1536, 1536)
    assert orpo.flops == 2 * sft.flops
    linear, table, width = 56 * (1920 * 1920 * 2 + 1920 * 384 * 2 + 3 * 1920 * 4800), 99_000 * 1920, 1920
    scoring = 2 * (linear + 128 * width * 56 + table)
    assert dpo.flops == orpo.flops + 1536 * scoring
    assert count("kto_qlora").flops == sft.flops + 768 * 3 * scoring


def test_a_chain_is_planned_with_the_frozen_copy_of_its_adapter(capsys):
    """The stage before has left nothing yet, so its adapter was taken for a fresh one, whose reference takes nothing."""
    settings = ("model.checkpoint=nano", "data.max_tokens=128", "adapter.train_tokens=[]")
    with pytest.raises(SystemExit) as stop:
        main(["plan", "instruct", "--json", *(word for setting in settings for word in ("-s", setting))])
    assert stop.value.code == 0
    first, second = (plan["parts"] for plan in json.loads(capsys.readouterr().out)["stages"].values())
    assert FROZEN_ADAPTER not in first
    assert second[FROZEN_ADAPTER] == second[ADAPTER] > 0


@pytest.mark.parametrize(("method", "beta", "scored"), [("grpo", None, 0), ("grpo", 0.01, 1), ("rloo", None, 1)])
def test_estimates_of_online_methods_count_the_reference_and_name_what_they_leave_out(
    make_recipe, method, beta, scored
):
    overrides = [f"method={method}", *SMALL, "trainer.max_completion_length=64"]
    recipe = make_recipe("grpo_qlora", *overrides)
    trainer = {key: value for key, value in recipe.recipe.trainer.items() if key != "beta"} | (
        {"beta": beta} if beta else {}
    )
    recipe = recipe.change(trainer=trainer)
    plan = make_plan(recipe, Target(True))
    sizes = read_sizes(recipe)
    linear, table, width = count_matrix_weights(sizes)
    scoring = 2 * (linear + 192 * width * sizes["num_hidden_layers"] + table)
    bare = count_work(set_batch(as_training_step(recipe), 4, 1), sizes)
    assert plan.step.tokens == bare.tokens == 4 * 192
    assert plan.step.flops - bare.flops == scored * plan.step.tokens * scoring
    assert describe_plan(plan).endswith("nothing here was timed; the time for generating answers is not included)")
