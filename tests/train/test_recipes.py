"""Every shipped recipe trains two steps on nano, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from finetune.check import load_recipe
from finetune.export.merge import ExportSettings, export_result
from finetune.export.verify import LogitVerifier
from finetune.resources import list_recipes
from finetune.train.origin import open_result
from finetune.train.run import run_training

# Two steps on nano; the real models' optimizer states in 8 bits need a GPU.
SMALL = ["model.checkpoint=nano", "trainer.max_steps=2", "trainer.warmup_steps=0", "trainer.disable_tqdm=true"]
EXPORT = ExportSettings("auto", 2 * 10**9)


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_train(tmp_path, name):
    recipe = load_recipe(list_recipes()[name], [*SMALL, f"output={tmp_path / 'run'}"])
    if not torch.cuda.is_available() and str(recipe.trainer.get("optim", "")).startswith("paged"):
        recipe = load_recipe(list_recipes()[name], [*SMALL, f"output={tmp_path / 'run'}", "trainer.optim=adamw_torch"])
    run = Path(run_training(recipe).run)
    report = export_result(open_result(run), tmp_path / "export", EXPORT, LogitVerifier())
    assert report.verify.top1_agreement > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("overrides", [["model.quantize=nf4"], ["model.quantize=int8"], ["model.dtype=bfloat16"]])
def test_gpu_runs_export_and_verify(tmp_path, overrides):
    settings = ["model.checkpoint=nano", "trainer.max_steps=10", *overrides, f"output={tmp_path / 'run'}"]
    run = Path(run_training(load_recipe(list_recipes()["demo"], settings)).run)
    assert export_result(open_result(run), tmp_path / "export", EXPORT, LogitVerifier()).verify.max_abs <= 1e-4
