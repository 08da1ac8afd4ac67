"""The issue that users meet first: real rows, from a start in each published layout, with and without 4-bit weights."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune.check.recipes import load_recipe
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

RECIPE = """
data:
  train: gsm8k.jsonl
  columns: {prompt: question, completion: answer}
  held_out: 20
  max_tokens: 256
  overflow: drop
adapter: {rank: 16, alpha: 32}
trainer:
  max_steps: 24
  learning_rate: 2e-3
  per_device_train_batch_size: 2
  gradient_checkpointing: false
  logging_steps: 1
  disable_tqdm: true
"""


def store_as_published(folder):
    """One file, `miniyulan`, tied: as nano itself is stored."""


def store_with_invalid_json(folder):
    """`yulanmini` with remote code that must not run, and the stray comma of Before-Annealing."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "yulanmini", "architectures": ["YuLanMiniForCausalLM"]}
    text = json.dumps(config, indent=2)
    auto_map = '{\n  "auto_map": {"AutoModelForCausalLM": "modeling_yulanmini.YuLanMiniForCausalLM",},'
    (folder / "config.json").write_text(auto_map + text.removeprefix("{"))
    (folder / "modeling_yulanmini.py").write_text("raise SystemExit('remote code was run')\n")


def store_in_shards(folder):
    """Three files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("store", [store_as_published, store_with_invalid_json, store_in_shards])
def test_gsm8k_trains_exports_and_verifies(shared, nano, tmp_path, store, quantize):
    lines = (shared / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "gsm8k.jsonl").write_text("".join(lines[:500]), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shutil.copytree(nano, tmp_path / "start")
    store(tmp_path / "start")
    recipe = load_recipe(
        tmp_path / "recipe.yaml",
        [f"model.checkpoint={tmp_path / 'start'}", f"model.quantize={quantize}", f"output={tmp_path / 'run'}"],
    )
    run = Path(run_training(recipe).run)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    report = export_result(open_result(run), tmp_path / "export", ExportSettings("auto", "2GB"), LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    assert report.verify.top1_agreement == 1.0
