"""What becomes of a run: every kind of training is exported and verified, into either base."""

from dataclasses import asdict

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from finetune.errors import CheckpointError, ExportError
from finetune.evaluation.token_loss import evaluate_rows
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.opening import open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.quantize=nf4"],
        ["model.quantize=int8"],
        ["adapter.rslora=true"],
        ["adapter.dora=true"],
        ["adapter.init=pissa", "adapter.rslora=true", "adapter.modules_to_save=[lm_head,norm]"],
        ["adapter.init=pissa", "adapter.train_tokens=[104,105,106]"],
        ["model.quantize=nf4", "adapter.train_tokens=[104,106]"],
        ["adapter.targets=[q_proj,down_proj]", "trainer.neftune_noise_alpha=5"],
        ["adapter.kind=none", "adapter.rank=16", "adapter.alpha=32"],
        ["model.dtype=bfloat16", "trainer.gradient_checkpointing=true"],
        ["model.architecture=native", "adapter.modules_to_save=[embed_tokens,lm_head,norm,input_layernorm]"],
        ["model.architecture=native", "adapter.kind=none", "adapter.rank=16", "adapter.alpha=32"],
        ["model.architecture=native", "model.quantize=nf4", "adapter.train_tokens=[104,106]"],
        ["model.architecture=native", "adapter.init=pissa", "trainer.packing=true"],
    ],
    ids=lambda overrides: "+".join(item.split(".")[-1] for item in overrides),
)
def test_every_kind_of_training_exports_and_verifies(train, tmp_path, overrides):
    run = train("run", *overrides, "trainer.learning_rate=1e-2")
    report = export_result(open_result(run), tmp_path / "export", ExportSettings("auto", "2GB"), LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    assert report.verify.top1_agreement == 1.0
    if "adapter.kind=none" not in overrides:
        assert report.verify.effect_kl > 1e-4  # the adapter does something, so losing it would be seen


def test_the_native_model_begins_where_its_fold_does(train, read_losses):
    fast = "trainer.learning_rate=2e-2"  # four steps
    folded, native = train("folded", fast), train("native", fast, "model.architecture=native")
    assert read_losses(native)[0] == pytest.approx(read_losses(folded)[0], abs=1e-5)
    assert read_losses(native)[-1] < read_losses(native)[0] - 0.1


def test_a_start_without_a_native_form_is_refused(make_recipe, nano_llama, tmp_path):
    with pytest.raises(CheckpointError, match="is stored as Llama, so its native architecture cannot be trained"):
        run_training(make_recipe("run", "model.architecture=native", f"model.checkpoint={nano_llama}"))
    assert not (tmp_path / "run").exists()


def test_the_dequantized_base_is_the_one_that_was_trained_on(train, tmp_path):
    """The merge into full precision answers differently from the adapter that was tried: reported against every peer."""
    run = open_result(train("run", "model.quantize=nf4", "trainer.learning_rate=1e-2"))
    report = export_result(run, tmp_path / "same", ExportSettings("auto", "2GB", base="dequantized"), LogitVerifier())
    assert report.bases.dequantized.loss == pytest.approx(report.bases.trained_loss, abs=1e-5)
    assert report.bases.dequantized.kl < 1e-9
    assert report.bases.dequantized.top1_agreement == 1.0
    assert report.bases.full.kl > 1e-5
    assert report.verify.max_abs <= 1e-4
    exported = evaluate_rows(open_model(str(tmp_path / "same")), Dataset.from_list([asdict(row) for row in run.rows]))
    assert exported.loss == pytest.approx(report.bases.trained_loss, abs=1e-4)
    automatic = export_result(run, tmp_path / "auto", ExportSettings("auto", "2GB", base="auto"), LogitVerifier())
    lower = "full" if report.bases.full.loss <= report.bases.dequantized.loss else "dequantized"
    assert automatic.base == lower
    assert f"merged into the {'dequantized' if lower == 'dequantized' else 'full-precision'} base (this folder)" in (
        tmp_path / "auto" / "README.md"
    ).read_text(encoding="utf-8")


def test_only_the_named_token_rows_are_trained(train, nano_llama, tmp_path):
    run = train("run", "adapter.train_tokens=[104,106]", "trainer.learning_rate=1e-2")
    export_result(open_result(run), tmp_path / "export", ExportSettings("auto", "2GB"))
    before, after = load_file(nano_llama / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [104, 106]


def test_a_base_that_cannot_be_chosen_is_refused(train, tmp_path):
    settings = ExportSettings("auto", "2GB", base="dequantized")
    with pytest.raises(ExportError, match="--base dequantized is for adapters of quantized runs"):
        export_result(open_result(train("plain")), tmp_path / "export", settings)
    settings = ExportSettings("auto", "2GB", base="auto")
    with pytest.raises(
        ExportError, match=r"--base auto chooses by measuring, which --no-verify \(verify=False in Python\) skips"
    ):
        export_result(open_result(train("quantized", "model.quantize=nf4")), tmp_path / "export", settings)
    assert not (tmp_path / "export").exists()
