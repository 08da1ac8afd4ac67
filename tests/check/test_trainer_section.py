"""Numbers that no run can have, words whose packages are missing, and the names of other tools, are said before anything is loaded."""

import importlib.util

import pytest

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.recipe.foreign_names import _NAMES
from finetune.recipe.methods import METHODS
from finetune.recipe.sections import Recipe
from finetune.recipe.trl_options import read_trainer_options

PAIRS = ["method=dpo", "data.train=pairs.jsonl"]
PROMPTS = ["method=grpo", "data.train=pairs.jsonl", "rewards.rules={final_answer: 1.0}"]


@pytest.fixture
def find_problem(make_recipe, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def find(*overrides):
        with pytest.raises(RecipeError) as caught:
            make_recipe("run", *overrides)
        (problem,) = caught.value.problems
        return problem

    return find


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("trainer.num_train_epochs=0", "must be above 0; found 0"),
        ("trainer.max_steps=0", "must be at least 1, or -1 to count epochs; found 0"),
        ("trainer.max_steps=-2", "must be at least 1, or -1 to count epochs; found -2"),
        ("trainer.gradient_accumulation_steps=0", "must be at least 1; found 0"),
        ("trainer.learning_rate=-1e-4", "must be at least 0; found -0.0001"),
        ("trainer.adam_beta1=1.5", "must be at least 0 and below 1; found 1.5"),
        ("trainer.save_steps=0", "must be a whole number of steps, or a share of the run below 1; found 0"),
        (
            "trainer.per_device_train_batch_size=999999999999999",
            "must be at least 1 and at most 1,048,576; found 999999999999999",
        ),
        ("trainer.dataloader_num_workers=100000", "must be at least 0 and at most 1,024; found 100000"),
        ("data.workers=100000", "must be at most 1,024; found 100000"),
        ("adapter.rank=99999999999999999999", "must be at most 65,536; found 99999999999999999999"),
        ("answers=99999999999999999999", "at most 131,072; found 99999999999999999999"),
        ("trainer.eval_steps=1.5", "must be a whole number of steps, or a share of the run below 1; found 1.5"),
        ("trainer.dataloader_prefetch_factor=2", "set dataloader_num_workers too"),
        ("trainer.pad_to_multiple_of=0", "must be at least 1; found 0"),
        ("trainer.log_level=loud", "'loud' is unknown"),
        ("trainer.gradient_checkpointing_kwargs={foo: 1}", "foo: unknown key"),
        (
            "trainer.gradient_checkpointing_kwargs={every_n_layers: 0}",
            "every_n_layers: must be a whole number above 0; found 0",
        ),
        ("trainer.accelerator_config=gone.json", "there is no file gone.json"),
        ("trainer.load_best_model_at_end=true", "needs evaluations"),
        ("trainer.early_stopping_patience=2", "needs load_best_model_at_end: true"),
        ("trainer.early_stopping_patience=0", "must be a whole number of evaluations above 0"),
    ],
)
def test_values_that_no_run_can_have(find_problem, setting, expected):
    overrides = (
        ["trainer.load_best_model_at_end=true", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch"]
        if setting.endswith("patience=0")
        else []
    )
    key = setting.partition("=")[0]
    problem = find_problem(setting, *overrides)
    assert problem.startswith(key)
    assert expected in problem


@pytest.mark.parametrize("steps", ["eval_steps=1", "logging_steps=1", "save_steps=20"])
def test_the_best_step_must_be_a_saved_one(find_problem, steps):
    """The best step was one without a checkpoint, and the last weights were the result without a word."""
    by_steps = ["trainer.eval_strategy=steps", "trainer.save_strategy=steps"]
    problem = find_problem("trainer.load_best_model_at_end=true", *by_steps, f"trainer.{steps}")
    assert "set eval_steps and save_steps to the same number" in problem


@pytest.mark.parametrize("setting", ["trainer.beta=0", "trainer.label_smoothing=0.5", "trainer.ld_alpha=2"])
def test_values_of_preference_losses(find_problem, setting):
    assert f"{setting.partition('=')[0]}: must be" in find_problem(setting, *PAIRS, "data.eval=[]")


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.temperature=0",
        "trainer.num_generations=1",
        "trainer.top_p=0",
        "trainer.loss_type=x",
        "trainer.scale_rewards=x",
    ],
)
def test_values_of_online_methods(find_problem, setting):
    assert setting.partition("=")[0] in find_problem(setting, *PROMPTS, "data.eval=[]")


def test_a_zero_kl_weight_is_fine_for_online_methods(make_recipe, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert make_recipe("run", *PROMPTS, "data.eval=[]", "trainer.beta=0").recipe.trainer["beta"] == 0


@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("trainer.report_to=wandb", "wandb"),
        ("trainer.report_to=[tensorboard]", "tensorboard"),
        ("trainer.optim=lion_8bit", "bitsandbytes"),
    ],
)
def test_words_whose_packages_are_missing(find_problem, monkeypatch, tmp_path, setting, package):
    monkeypatch.chdir(tmp_path)
    right = importlib.util.find_spec
    missing = {package, "tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else right(name))
    problem = find_problem(setting)
    assert problem.startswith(setting.partition("=")[0])
    assert f"needs the package {package}, which is not installed" in problem


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("adapter.r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("data.cutoff_len", "data.max_tokens"),
        ("max_seq_length", "data.max_tokens"),
        ("trainer.group_by_length", "trainer.train_sampling_strategy: group_by_length"),
        ("trainer.no_cuda", "trainer.use_cpu"),
        ("model.load_in_4bit", "model.quantize: nf4"),
        ("lora_dropout", "adapter.dropout"),
        ("adapter.target_modules", "adapter.targets"),
        ("adapter.use_rslora", "adapter.rslora"),
        ("adapter.use_dora", "adapter.dora"),
        ("train_type", "adapter.kind"),  # ms-swift: lora or full
    ],
)
def test_names_of_other_tools(find_problem, key, own):
    assert find_problem(f"{key}=1") == f"{key}: unknown key; this is {own} here"


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("adapter.bias", "have no biases, and an adapter gives them none; remove this key"),
        ("adapter.exclude_modules", "name the layers that are to be trained in adapter.targets instead"),
        ("adapter.target_parameters", "take adapter.targets"),
        ("adapter.task_type", "it follows from the method; remove this key"),
    ],
)
def test_keys_of_other_tools_that_have_no_counterpart(find_problem, key, advice):
    problem = find_problem(f"{key}=1")
    assert problem.startswith(f"{key}: unknown key; ")
    assert advice in problem


def test_every_proposed_name_exists():
    trainer = read_trainer_options("trl.trainer.sft_config", "SFTConfig")
    preference = read_trainer_options("trl.trainer.dpo_config", "DPOConfig")
    for name, own in _NAMES.items():
        key = own.split(" ")[0].split(":")[0]
        section, _, inner = key.partition(".")
        target = getattr(Recipe(), section)
        if section == "trainer":
            assert inner in {*trainer, *preference, "early_stopping_patience"}, name
        elif inner:
            target = getattr(target, inner.partition(".")[0])


def test_few_keys_are_shown_and_none_that_the_method_refuses(find_problem):
    problem = find_problem("trainer.warm=1")
    assert len(problem) < 200
    owned = METHODS["sft"].owned
    assert not any(name in problem for name in owned)
    assert find_problem("trainer.learningrate=1") == "trainer.learningrate: unknown key; did you mean 'learning_rate'?"


def test_what_the_method_has_not_is_not_proposed(find_problem):
    assert "trainer.packing" not in find_problem("trainer.sample_packing=true", *PAIRS, "data.eval=[]")


@pytest.mark.parametrize("setting", ["model.checkpoint=~nouser/x", "data.train=~nouser/x", "output=~nouser/x"])
def test_the_home_of_a_user_who_does_not_exist(find_problem, setting):
    assert "nouser" in find_problem(setting)


@pytest.mark.parametrize("peft_type", ["IA3", "LOHA", "PROMPT_TUNING", None])
def test_an_adapter_of_another_kind_is_no_base(find_problem, tmp_path, peft_type):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text(f'{{"peft_type": "{peft_type}"}}')
    assert "only LORA adapters can be used here" in find_problem(f"model.checkpoint={tmp_path / 'other'}")


def test_a_configuration_that_is_a_list_is_one_message(find_problem, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("[]")
    assert "must hold an object; found list" in find_problem(f"model.checkpoint={tmp_path / 'other'}")


def test_a_recipe_without_problems_still_loads(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "r.yaml").write_text(
        "data: {train: rows.jsonl}\ntrainer: {learning_rate: 0, max_steps: -1, warmup_steps: 0.1}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").recipe.trainer["warmup_steps"] == 0.1
