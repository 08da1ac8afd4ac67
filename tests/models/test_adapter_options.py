"""Options of the adapter: each changes what is trained, and what it leaves behind is exported as it was trained."""

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from finetune.errors import RecipeError, TrainingError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.lora import raise_rate_of_b
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training


@pytest.mark.parametrize(
    "settings",
    [
        ["adapter.layers=[1, 3]"],
        ["adapter.init=olora"],
        ["adapter.init=olora", "adapter.rslora=true", "adapter.layers=[0]"],
    ],
)
def test_runs_export_as_they_were_trained(train, tmp_path, settings):
    run = train("run", *settings, "trainer.learning_rate=1e-2")
    report = export_result(open_result(run), tmp_path / "export", ExportSettings("float32"), LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    assert report.verify.effect_kl > 1e-4


def test_only_the_named_layers_are_trained(train):
    names = load_file(
        train("run", "adapter.layers=[1, 3]", "trainer.max_steps=1") / "adapter" / "adapter_model.safetensors"
    )
    assert {name.split("layers.")[1].split(".")[0] for name in names} == {"1", "3"}
    assert len(names) == 2 * 7 * 2


def test_a_layer_that_is_not_there(make_recipe):
    with pytest.raises(
        TrainingError, match=r"adapter.layers: \[99\] lie outside the 4 layers of the base model, 0 to 3"
    ):
        run_training(make_recipe("run", "adapter.layers=[2, 99]"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adapter.layers=[-1]", "adapter.layers: must be numbers of layers from 0 on"),
        ("adapter.layers=[1, 1]", "each once"),
        ("adapter.loraplus_ratio=0", "adapter.loraplus_ratio: must be above 0"),
    ],
)
def test_values_that_cannot_be(make_recipe, setting, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("run", setting)


def test_b_is_trained_faster_than_a(train, read_losses):
    """With a rate of 0 for A there would be nothing to multiply, so the rates of the optimizer itself are read below."""
    plain, plus = train("plain"), train("plus", "adapter.loraplus_ratio=16")
    assert read_losses(plain)[0] == pytest.approx(read_losses(plus)[0], abs=1e-6)
    assert read_losses(plain)[-1] != pytest.approx(read_losses(plus)[-1], abs=1e-3)
    assert train("one", "adapter.loraplus_ratio=1").joinpath("adapter").is_dir()
    assert read_losses(plain)[-1] == pytest.approx(read_losses(plain.parent / "one")[-1], abs=1e-6)


def test_the_rates_of_loraplus(nano_llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(LlamaForCausalLM.from_pretrained(nano_llama), LoraConfig(target_modules=["q_proj"]))
    config = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-4, weight_decay=0.1, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model, config)
    raise_rate_of_b(trainer, 8)
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx((8e-4 if "lora_B" in name else 1e-4, 0.1)), name
    assert len(rates) == 8


def test_a_later_run_takes_the_layers_over(train, make_recipe):
    first = train("first", "adapter.layers=[1]", "trainer.max_steps=1")
    assert make_recipe("second", f"model.checkpoint={first}").recipe.adapter.layers == (1,)
    with pytest.raises(RecipeError, match=r"adapter.layers: .* was trained with \[1\], and its adapter must keep that"):
        make_recipe("third", f"model.checkpoint={first}", "adapter.layers=[2]")
