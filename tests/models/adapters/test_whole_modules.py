"""Whole modules beside LoRA (PEFT's modules_to_save): trained in float32, saved, continued, and merged by an export."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import RecipeError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter, continue_adapter
from finetune.models.plain_adapter import list_obstacles
from finetune.models.precision import Precision
from finetune.models.reference_model import REFERENCE, settle_reference
from finetune.recipe.sections import WHOLE_MODULES, AdapterSection, ModelSection
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

CPU = torch.device("cpu")
FAST = "trainer.learning_rate=1e-2"
NORMS = [f"model.layers.{layer}.post_attention_layernorm.weight" for layer in range(4)]


def export(run, folder, dtype="float32"):
    return export_result(open_result(run), folder, ExportSettings(dtype), LogitVerifier())


@pytest.mark.parametrize(
    ("modules", "changed"),
    [
        ("[lm_head, post_attention_layernorm]", ["lm_head.weight", *NORMS]),
        ("[embed_tokens, norm]", ["model.embed_tokens.weight", "model.norm.weight"]),
    ],
)
def test_only_the_named_modules_are_trained(train, nano_llama, tmp_path, modules, changed):
    run = train("run", f"adapter.modules_to_save={modules}", FAST, "trainer.max_steps=1")
    report = export(run, tmp_path / "export")
    assert report.verify.max_abs <= 1e-4
    before, after = load_file(nano_llama / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    other = [name for name in before if not torch.equal(before[name], after[name]) and "_proj" not in name]
    assert sorted(other) == sorted(changed)
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    for name in changed:  # replaced, not added to
        assert torch.equal(stored[f"base_model.model.{name}"], after[name])


def test_a_tied_head_is_trained_alone(train, nano_llama, tmp_path):
    base = tmp_path / "tied"
    shutil.copytree(nano_llama, base)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    run = train("run", f"model.checkpoint={base}", "adapter.modules_to_save=[lm_head]", FAST)
    assert export(run, tmp_path / "export").verify.max_abs <= 1e-4
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["model.embed_tokens.weight"])


BFLOAT16 = ("model.dtype=bfloat16", "adapter.modules_to_save=[embed_tokens, lm_head, norm, input_layernorm]")


def test_copies_of_bfloat16_modules_are_trained_in_float32(train, make_recipe, nano_llama, tmp_path):
    """PEFT copies them in bfloat16, where a step of 1e-4 on a norm's weight of 1 is lost: 1 + 1e-4 is 1 there."""
    run = train("first", *BFLOAT16, "trainer.learning_rate=1e-4", "trainer.max_steps=1")
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    whole = {name: tensor for name, tensor in stored.items() if "lora_" not in name}
    assert len(whole) == 3 + 4
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32, name
        assert not torch.equal(tensor, tensor.bfloat16().float()), name
    assert export(run, tmp_path / "export").verify.max_abs <= 1e-4
    # A later run begins with these very numbers, and so does the frozen copy that is its reference model.
    model = load_base(nano_llama, ModelSection(), Precision(torch.bfloat16, "bf16"), CPU)
    tuned = continue_adapter(model, AdapterSection(), run / "adapter")
    tuned.add_adapter(REFERENCE, tuned.peft_config["default"])
    settle_reference(tuned, drop=False)
    parameters = dict(tuned.named_parameters())
    for name, tensor in whole.items():
        for adapter in ("default", REFERENCE):
            assert torch.equal(parameters[f"{name.removesuffix('.weight')}.modules_to_save.{adapter}.weight"], tensor)
    earlier = make_recipe("second", f"model.checkpoint={run}").recipe.adapter
    assert earlier.modules_to_save == ("embed_tokens", "input_layernorm", "lm_head", "norm")


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_keep_the_dtype_of_the_base(nano_llama, autocast):
    """A float32 embedding would make every activation after it float32, twice the memory of the plan without it."""
    model = load_base(nano_llama, ModelSection(), Precision(torch.bfloat16, "bf16"), CPU)
    tuned = attach_adapter(model, AdapterSection(rank=2, modules_to_save=tuple(WHOLE_MODULES)), nano_llama)
    seen = set()
    for module in tuned.get_base_model().model.layers:
        module.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    ids = torch.arange(16).reshape(1, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    gradients = {name: p.grad for name, p in tuned.named_parameters() if "modules_to_save" in name}
    assert len(gradients) == 2 + 1 + 8
    assert all(grad.dtype == torch.float32 and grad.abs().max() > 0 for grad in gradients.values())


def test_preferences_after_supervised_fine_tuning(train, make_pairs_recipe, read_losses, tmp_path):
    """The reference model is the one before step 1, with its whole modules, so the first loss is ln 2."""
    train("sft", "adapter.modules_to_save=[lm_head, norm]", FAST, "trainer.max_steps=1")
    short = ("data.max_tokens=256", "trainer.max_steps=2", FAST)
    run_training(make_pairs_recipe("after", "dpo", f"model.checkpoint={tmp_path / 'sft'}", *short))
    losses = read_losses(tmp_path / "after")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] != pytest.approx(losses[0], abs=1e-3)
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("sft", "after"))
    assert first.keys() == second.keys()
    assert not any(
        torch.equal(first[f"base_model.model.{name}"], second[f"base_model.model.{name}"])
        for name in ("lm_head.weight", "model.norm.weight")
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.modules_to_save=[q_proj]"], "q_proj is a linear layer, which LoRA trains .*adapter.kind: none"),
        (["adapter.modules_to_save=[lm_heads]"], "'lm_heads' is unknown; did you mean 'lm_head'"),
        (["adapter.modules_to_save=[norm, norm]"], r"must name each module once; found \['norm', 'norm'\]"),
        (
            ["adapter.modules_to_save=[lm_head, norm]", "adapter.train_tokens=[104]"],
            r"adapter.train_tokens: trains rows of the token tables, and adapter.modules_to_save trains lm_head whole; set train_tokens: \[\]",
        ),
        (["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "adapter.modules_to_save=[norm]"], "adapter.modules_to_save: has no effect"),
        (["method=reward", "data.train=pairs.jsonl", "adapter.modules_to_save=[lm_head]"], "a reward model has no lm_head"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_trained_whole(make_recipe, settings, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("run", *settings)


def test_token_rows_and_norms_go_together(train):
    run = train("run", "adapter.modules_to_save=[norm]", "adapter.train_tokens=[104, 105]", "trainer.max_steps=1")
    assert list_obstacles(run / "adapter") == [
        "it trains rows of the token tables (adapter.train_tokens)",
        "it trains model.norm whole (adapter.modules_to_save)",
    ]
