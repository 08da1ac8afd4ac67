"""Every shipped recipe trains two steps on nano, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from finetune.check.chains import load_chain
from finetune.check.recipes import load_recipe
from finetune.errors import ExportError
from finetune.evaluation.pairs import evaluate_pairs
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.resources import find_demo_data, list_recipes
from finetune.pipeline.chain import run_chain
from finetune.recipe.methods import METHODS
from finetune.recipe.recipe_file import read_recipe
from finetune.recipe.yaml_loader import load_recipe_file
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

# Two steps on nano; the real models' optimizer states in 8 bits need a GPU.
SMALL = [
    "model.checkpoint=nano",
    "trainer.max_steps=2",
    "trainer.warmup_steps=0",
    "trainer.disable_tqdm=true",
    "answers=2",
]
# A packed method counts its steps in its schedule; nano has no published states.
SMALL_PRETRAINING = [
    "model.checkpoint=nano",
    "data.max_tokens=128",
    "optimizer.states=fresh",
    "schedule.unit=steps",
    "schedule.length=2",
    "schedule.warmup=0",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=2",
    "trainer.disable_tqdm=true",
]
CHAINS = [name for name, path in list_recipes().items() if "stages" in load_recipe_file(path)]
EXPORT = ExportSettings("auto", "2GB")


@pytest.mark.parametrize("name", [name for name in list_recipes() if name not in CHAINS])
def test_shipped_recipes_train(tmp_path, name):
    pretrains = METHODS[read_recipe(list_recipes()[name]).recipe.method].is_pretraining
    overrides = [*(SMALL_PRETRAINING if pretrains else SMALL), f"output={tmp_path / 'run'}"]
    recipe = load_recipe(list_recipes()[name], overrides)
    if not torch.cuda.is_available() and str(recipe.recipe.trainer.get("optim", "")).startswith("paged"):
        recipe = load_recipe(list_recipes()[name], [*overrides, "trainer.optim=adamw_torch"])
    if recipe.method.is_online:
        # nano never ends an answer by itself.
        short = ["trainer.max_completion_length=4", "trainer.gradient_accumulation_steps=1", "data.held_out=4"]
        recipe = load_recipe(list_recipes()[name], [*overrides, *short])
    if recipe.method.shape in ("pair", "labelled"):
        recipe = load_recipe(list_recipes()[name], [*overrides, "trainer.gradient_accumulation_steps=1"])
    run = Path(run_training(recipe).run)
    if recipe.method.trains_reward_model:
        scores = evaluate_pairs(str(run), [find_demo_data("pairs.jsonl")], 256)
        assert 0 <= scores.accuracy <= 1
        assert scores.pairs == 120
        with pytest.raises(ExportError, match="is a reward model, and only language models can be exported"):
            export_result(open_result(run), tmp_path / "export", EXPORT)
        return
    report = export_result(open_result(run), tmp_path / "export", EXPORT, LogitVerifier())
    assert report.verify.top1_agreement > 0.9


@pytest.mark.parametrize("name", CHAINS)
def test_shipped_chains_run(tmp_path, name):
    overrides = [*SMALL, "trainer.gradient_accumulation_steps=1", "data.held_out=4", f"output={tmp_path / 'chain'}"]
    summary = run_chain(load_chain(list_recipes()[name], overrides))
    assert summary.export is not None
    assert summary.stages[-1].result["verify"]["top1_agreement"] > 0.9
    assert len(summary.stages[-1].result["origin"]["earlier"]) == len(summary.stages) - 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("overrides", [["model.quantize=nf4"], ["model.quantize=int8"], ["model.dtype=bfloat16"]])
def test_gpu_runs_export_and_verify(tmp_path, overrides):
    settings = ["model.checkpoint=nano", "trainer.max_steps=10", *overrides, f"output={tmp_path / 'run'}"]
    run = Path(run_training(load_recipe(list_recipes()["demo"], settings)).run)
    assert export_result(open_result(run), tmp_path / "export", EXPORT, LogitVerifier()).verify.max_abs <= 1e-4
