"""The adapter of a run alone: what is stored of its settings, plain LoRA that computes the same, and reasons where there is none."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from finetune.cli.main import main
from finetune.errors import ExportError
from finetune.models import plain_adapter
from finetune.models.lora import list_adapter_defaults
from finetune.models.opening import open_model
from finetune.models.plain_adapter import describe_use, list_obstacles, write_plain_adapter
from finetune.runs.results import EarlierRun, Lineage, open_result

IDS = torch.arange(107, 139).unsqueeze(0)


@pytest.fixture
def make_adapter(nano_llama):
    """Return a function that writes an adapter of nano with every number random, as PEFT does."""

    def make(folder, **options):
        model = LlamaForCausalLM.from_pretrained(nano_llama)
        model.name_or_path = str(nano_llama)
        options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make


def read_logits(base, adapter):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_run_stores_no_setting_that_has_its_default(train):
    """PEFT 0.13 refuses an adapter for each key that it does not know, whatever its value."""
    config = json.loads((train("run") / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    base = config.pop("base_model_name_or_path")
    assert "folds" in base
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    assert config == {**expected, "task_type": "CAUSAL_LM", "inference_mode": True}


@pytest.mark.parametrize(
    ("options", "rank", "alpha"),
    [
        ({}, 4, 12),
        ({"use_rslora": True}, 4, 24),
        ({"use_rslora": True, "r": 5, "lora_alpha": 10}, 5, 5),  # its scale, 10 / sqrt(5), goes into B
        ({"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}, 6, 6),
        ({"layers_to_transform": [1, 2], "target_modules": ["q_proj", "up_proj"]}, 4, 12),
        ({"target_modules": r".*\.[02]\..*v_proj"}, 4, 12),
    ],
    ids=["plain", "rslora", "rslora-odd", "patterns", "layers", "pattern"],
)
def test_plain_lora_computes_the_same(make_adapter, nano_llama, tmp_path, options, rank, alpha):
    source = make_adapter(tmp_path / "source", **options)
    report = write_plain_adapter(open_result(source), tmp_path / "plain")
    assert (report.rank, report.alpha) == (rank, alpha)
    assert report.max_difference < 1e-6
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text(encoding="utf-8"))
    assert not {"use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"} & config.keys()
    stored = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name} == {rank}
    assert len(stored) == 2 * report.modules == len(load_file(source / "adapter_model.safetensors"))
    expected = read_logits(nano_llama, source)
    torch.testing.assert_close(read_logits(nano_llama, tmp_path / "plain"), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        base = LlamaForCausalLM.from_pretrained(nano_llama)(input_ids=IDS).logits
    assert (expected - base).abs().max() > 1e-3  # an adapter without effect would prove nothing


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"trainable_token_indices": {"embed_tokens": [104, 106]}},
            r"it trains rows of the token tables \(adapter.train_tokens\)",
        ),
        ({"use_dora": True}, r"it is DoRA \(adapter.dora\)"),
        ({"modules_to_save": ["lm_head"]}, r"it trains lm_head whole \(adapter.modules_to_save\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "it changes the token tables"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "it trains biases"),
    ],
)
def test_what_plain_lora_cannot_hold_is_named(make_adapter, tmp_path, options, reason):
    source = make_adapter(tmp_path / "source", **options)
    with pytest.raises(
        ExportError, match=rf"cannot be written as plain LoRA: .*{reason}.*export the merged model instead"
    ):
        write_plain_adapter(open_result(source), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert "only PEFT can apply this adapter" in describe_use(source)


def test_a_pissa_adapter_of_other_tools_is_refused(make_adapter, tmp_path):
    source = make_adapter(tmp_path / "source")
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa_niter_16"}))
    assert list_obstacles(source) == ["its init_lora_weights 'pissa_niter_16' changed the base before training"]


@pytest.mark.parametrize("rank", [16, 24])
def test_vllms_limit_is_named(make_adapter, tmp_path, rank):
    found = describe_use(make_adapter(tmp_path / "source", r=rank, target_modules=["q_proj"]))
    assert f"plain LoRA of rank {rank}" in found
    assert ("--max-lora-rank 32" in found) == (rank == 24)


def test_the_command_line_writes_an_adapter_that_answers_the_same(train, capsys, caplog, tmp_path):
    """PiSSA's adapters change their base while they train; a run stores the equal plain one, of twice the rank."""
    caplog.set_level("INFO", "finetune")
    run = train("run", "adapter.init=pissa")
    assert f"`finetune export {run} --adapter` writes this adapter as plain LoRA of rank 8" in caplog.text
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), "--adapter", "-o", str(tmp_path / "plain"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 8
    answers = [open_model(str(path)).answer("Who are you?", 8) for path in (run, tmp_path / "plain")]
    assert answers[0] == answers[1]


def test_a_run_with_trained_tokens_says_so(train, caplog, capsys, tmp_path):
    caplog.set_level("INFO", "finetune")
    run = train("run", "adapter.train_tokens=[104,106]", "trainer.max_steps=1")
    assert "adapter: only PEFT can apply this adapter: it trains rows of the token tables" in caplog.text
    for extra, message in (
        ([], "cannot be written as plain LoRA"),
        (["--no-verify"], "--no-verify is for merged weights"),
        (["--base-model", "base"], "--base-model is for merged weights"),  # it was ignored
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(run), "--adapter", "-o", str(tmp_path / "plain"), *extra])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run), "-o", str(tmp_path / "export")])
    assert "Only PEFT can apply this adapter" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_the_card_names_the_run_whose_weights_the_adapter_belongs_to(make_adapter, tmp_path):
    # It named the first checkpoint of the chain, on which the adapter of a later run gives other answers.
    for earlier, checkpoint, said in (
        (
            (EarlierRun("nano", "pretrain", "runs/full"),),
            "runs/full",
            "what that run trained, not `nano`: `finetune export runs/full",
        ),
        (
            (EarlierRun("nano", "sft", "runs/lora"),),
            "nano",
            "for `nano`. Its base is the Llama form of that checkpoint",
        ),
    ):
        lineage = Lineage(checkpoint, "folder", "0", "none", "float32", "chatml", "0", "sft", earlier=earlier)
        source = make_adapter(tmp_path / checkpoint / "source")
        output = tmp_path / checkpoint / "plain"
        write_plain_adapter(replace(open_result(source), lineage=lineage), output)
        assert said in (output / "README.md").read_text(encoding="utf-8")


def test_all_weights_hold_no_adapter(train, tmp_path):
    run = train("run", "adapter.kind=none", "adapter.rank=16", "adapter.alpha=32", "trainer.max_steps=1")
    with pytest.raises(ExportError, match="all weights were trained, so there is no adapter"):
        write_plain_adapter(open_result(run), tmp_path / "plain")


def test_the_defaults_are_those_of_peft():
    """A setting that PEFT always writes must not make an adapter odd."""
    given = {
        key: value for key, value in list_adapter_defaults().items() if value and key not in plain_adapter._EXPRESSIBLE
    }
    assert {key: value for key, value in given.items() if key != "bias"} == plain_adapter._DEFAULTS
