"""Every option of the trainers works, or is refused by its key before anything is loaded; the options come from the installed TRL."""

import pytest
import torch
from transformers import Trainer

from finetune.errors import RecipeError
from finetune.files.resources import find_demo_data
from finetune.recipe.methods import METHODS
from finetune.recipe.trl_options import read_trainer_options
from finetune.training.run import configure

PAIRS = [f"data.train={find_demo_data('pairs.jsonl')}", "data.eval=[]"]
PROMPTS = [f"data.train={find_demo_data('pairs.jsonl')}", "data.eval=[]", "rewards.rules={final_answer: 1.0}"]
# What a recipe of the method needs besides its name.
NEEDS = {"sequence": [], "pair": PAIRS, "labelled": PAIRS, "prompt": PROMPTS}
# Values by the type that an option is annotated with; of a limited option every word is tried instead.
VALUES = {
    "bool": ["true", "false"],
    "int": ["0", "1", "-1", "3"],
    "float": ["0", "0.5", "-0.5", "2"],
    "str": ["nonsense"],
    "dict": ["{}", "{nonsense: 1}"],
    "list": ["[]", "[nonsense]"],
}


def list_cases():
    """Yield one method for every option: the first that has it, since the others inherit it."""
    seen = set()
    for method in METHODS.values():
        for name, option in read_trainer_options(method.config_module, method.config_class).items():
            # Recipes for pre-training have sections of their own for what a short recipe here sets.
            is_known = (name, option.annotation) in seen or method.is_pretraining
            if not is_known and name not in method.owned:
                seen.add((name, option.annotation))
                yield pytest.param(method, option, id=f"{method.name}-{name}")


def list_values(method, option):
    if words := option.choices or method.words.get(option.name, ()):
        return list(words)
    kinds = {member.strip().split("[")[0] for member in option.annotation.split("|")}
    return [value for kind in VALUES if kind in kinds for value in VALUES[kind]]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("method", "option"), list(list_cases()))
def test_an_option_works_or_is_refused_by_its_key(make_recipe, method, option):
    """Refused are all values, or some; anything but a RecipeError that names the key would be a traceback."""
    base = [f"method={method.name}", *NEEDS[method.shape]]
    for value in list_values(method, option):
        try:
            resolved = make_recipe("run", *base, f"trainer.{option.name}={value}")
            _, _, config = configure(resolved)
        except RecipeError as error:
            assert f"trainer.{option.name}" in str(error) or f"  - {option.name}" in str(error), (value, str(error))
            continue
        step_once(config)


def step_once(config):
    """Build the optimizer of a configuration on a small model and take one step."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(config, model)
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("use_liger_kernel=true", "set gradient_checkpointing or activation_offloading"),
        ("deepspeed=zero3.json", "launch with recipes/accelerate/fsdp2.yaml, zero2.yaml or zero3.yaml"),
        ("save_total_limit=0", "must be at least 1; found 0"),
        ("max_grad_norm=-1", "must be at least 0; found -1"),
        ("optim=galore_adamw", "galore_adamw cannot be used: it projects the gradients"),
        ("optim=adamw_torch_4bit", "adamw_torch_4bit cannot be used"),
        ("activation_checkpointing_kwargs={nonsense: 1}", "activation_checkpointing_kwargs.nonsense: unknown key"),
    ],
)
def test_a_refusal_says_what_to_do(make_recipe, setting, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("run", f"trainer.{setting}")


def test_a_reporter_without_a_login_is_refused(make_recipe, monkeypatch, tmp_path):
    """The reporter's own error came after the model was loaded, as a traceback."""
    monkeypatch.setattr("finetune.check.trainer.option_values._is_installed", lambda package: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(RecipeError, match=r"trainer.report_to: wandb is not logged in; run `wandb login`"):
        make_recipe("run", "trainer.report_to=wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    make_recipe("run", "trainer.report_to=wandb")


def test_options_that_are_refused_say_why():
    """A reason is a sentence that says what to do instead."""
    for method in METHODS.values():
        for name, reason in method.owned.items():
            assert any(word in reason for word in ("set ", "remove this key", "use ", "run ", "launch")), (name, reason)
