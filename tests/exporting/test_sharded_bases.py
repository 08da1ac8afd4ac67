"""A base in several weight files with an index, as published bases are, gives the same as one in a single file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.api import evaluate, export, fold
from finetune.files.resources import find_demo_data
from finetune.yulan.shards import INDEX_FILE, SINGLE_FILE

SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
STEPS = ["trainer.max_steps=2"]
ALL_WEIGHTS = ["adapter={kind: none}", "trainer.learning_rate=1e-3", "model.dtype=float32"]


def split(folder, source=None):
    """Deal the tensors of a folder out to three files in turn, so that each layer lies in all of them; return the folder."""
    if source is not None:
        shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: SHARDS[place % 3] for place, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return folder


def read_all(folder):
    """Return the tensors of a folder of one or several weight files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(first, second):
    first, second = read_all(first), read_all(second)
    assert set(first) == set(second) != set()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def single(nano_llama, tmp_path):
    return shutil.copytree(nano_llama, tmp_path / "single")


@pytest.mark.parametrize("overrides", [[], ALL_WEIGHTS], ids=["lora", "all weights"])
def test_a_base_in_three_files_gives_the_same_run(train, single, tmp_path, overrides):
    split(tmp_path / "split", single)
    runs, exports, scores = {}, {}, {}
    for name in ("single", "split"):
        runs[name] = train(f"run_{name}", f"model.checkpoint={tmp_path / name}", *STEPS, *overrides)
        exports[name] = tmp_path / f"export_{name}"
        size = "2GB" if name == "single" else "100KB"
        assert export(runs[name], exports[name], max_shard_size=size).verify is not None  # compared with the run
        scores[name] = evaluate(exports[name], find_demo_data("demo_eval.jsonl"), max_tokens=256)
    result = "model" if overrides else "adapter"
    assert_same(runs["single"] / result, runs["split"] / result)
    assert len(list(exports["split"].glob("*.safetensors"))) > 2
    assert_same(exports["single"], exports["split"])
    assert (scores["single"].loss, scores["single"].tokens) == (scores["split"].loss, scores["split"].tokens)
    assert evaluate(tmp_path / "single", find_demo_data("demo_eval.jsonl"), max_tokens=256) == evaluate(
        tmp_path / "split", find_demo_data("demo_eval.jsonl"), max_tokens=256
    )


def test_a_run_of_all_weights_in_three_files_is_exported_and_trained_on(train, single, tmp_path):
    run = train("run", f"model.checkpoint={single}", *STEPS, *ALL_WEIGHTS)
    several = shutil.copytree(run, tmp_path / "several")
    (several / "model" / "manifest.json").unlink(missing_ok=True)
    (several / "manifest.json").unlink(missing_ok=True)
    split(several / "model")
    for name in ("run", "several"):
        export(tmp_path / name, tmp_path / f"export_{name}", verify=False)
        train(f"next_{name}", f"model.checkpoint={tmp_path / name}", *STEPS)
    assert_same(tmp_path / "export_run", tmp_path / "export_several")
    assert_same(tmp_path / "next_run" / "adapter", tmp_path / "next_several" / "adapter")


def test_a_native_base_in_three_files_folds_to_the_same(nano, tmp_path):
    fold(nano, tmp_path / "from_single")
    fold(split(tmp_path / "split", nano), tmp_path / "from_split", max_shard_size="100KB")
    assert len(list((tmp_path / "from_split").glob("*.safetensors"))) > 2
    assert_same(tmp_path / "from_single", tmp_path / "from_split")
