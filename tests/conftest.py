"""What every test starts from: a cache of its own, the nano checkpoint in it, and small runs of a few steps on nano."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from byte_level_tokenizer import write_byte_level_tokenizer
from legacy_tokenizer import write_legacy_tokenizer
from safetensors.torch import load_file, save_file

from finetune.check.recipes import load_recipe
from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.files.resources import find_demo_data
from finetune.training.run import run_training

RECIPE = """
model: {checkpoint: nano}
data: {train: rows.jsonl, eval: held.jsonl, max_tokens: 128}
adapter: {rank: 4, alpha: 8}
answers: 0
row_losses: 0
trainer:
  max_steps: 4
  learning_rate: 2e-3
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 8
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep folds and hashes of the tests out of the user's own cache, and the hub out of the tests; also in child processes."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_CACHE"] = str(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the library read the variable when it was imported
    return folder


@pytest.fixture(autouse=True)
def keep_logging_as_it_was():
    """The command line sends our notes to the standard error of the test that calls it."""
    logger = logging.getLogger("finetune")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def nano(cache):
    """The nano checkpoint in the published layout."""
    return find_checkpoint("nano")


@pytest.fixture(scope="session")
def nano_llama(nano):
    """Nano folded into Llama weights."""
    return as_llama(nano)


@pytest.fixture(scope="session")
def shared():
    """The folder of reference and real data beside the checkout; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture
def legacy_base(nano_llama, tmp_path):
    """Nano's weights with a small tokenizer of the published kind."""
    folder = tmp_path / "base"
    shutil.copytree(nano_llama, folder)
    write_legacy_tokenizer(folder)
    return folder


@pytest.fixture
def deep_base(nano_llama, tmp_path):
    """Nano with five layers, all different, in place of two."""
    folder = tmp_path / "deep"
    shutil.copytree(nano_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2, 5):
        like = f"model.layers.{layer % 2}."
        for name in [name for name in tensors if name.startswith(like)]:
            tensors[name.replace(like, f"model.layers.{layer}.")] = tensors[name] * (1 + layer / 20)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}), encoding="utf-8")
    return folder


@pytest.fixture
def byte_level_base(nano_llama, tmp_path):
    """Nano's weights with a small byte-level tokenizer."""
    folder = tmp_path / "byte_level"
    shutil.copytree(nano_llama, folder)
    write_byte_level_tokenizer(folder, find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines())
    return folder


@pytest.fixture
def published_base(nano_llama, tmp_path, shared):
    """Nano's weights with the larger tokenizer of the published kind that lies beside the checkout."""
    folder = tmp_path / "base"
    shutil.copytree(nano_llama, folder)
    for file in (shared / "reference" / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return widen_tables(folder, 6000)


def widen_tables(folder, rows):
    """Repeat the rows of both tables until there is one for every token."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].repeat(rows // len(tensors[name]) + 1, 1)[:rows].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}), encoding="utf-8")
    return folder


@pytest.fixture
def make_recipe(tmp_path, nano_llama):
    """Return a function that checks the small recipe with overrides; its run lies in `tmp_path/<name>`."""
    lines = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text("".join(lines[32:40]), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make(name, *overrides):
        return load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / name}", *overrides])

    return make


@pytest.fixture
def train(make_recipe):
    """Return a function that trains the small recipe and gives its run directory."""

    def run(name, *overrides, resume=False):
        return Path(run_training(make_recipe(name, *overrides), resume).run)

    return run


@pytest.fixture
def read_losses():
    """Return a function that reads the training losses of a run, step by step."""

    def read(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    return read


@pytest.fixture(scope="session")
def chain(tmp_path_factory, nano_llama):
    """Three runs, each going on from the one before: sft (with trained token rows), dpo, kto."""
    folder = tmp_path_factory.mktemp("chain")
    common = (
        "{max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: 4, logging_steps: 1, save_strategy: 'no', \
gradient_checkpointing: false, disable_tqdm: true, eval_strategy: 'no'}"
    )
    (folder / "sft.yaml").write_text(
        f"data: {{train: {find_demo_data('demo.jsonl')}, max_tokens: 256}}\nmodel: {{checkpoint: nano}}\n"
        f"adapter: {{rank: 4, targets: [q_proj, v_proj], train_tokens: [104, 106]}}\ntrainer: {common}\noutput: {folder / 'sft'}\n"
    )
    for method, start in (("dpo", "sft"), ("kto", "dpo")):
        (folder / f"{method}.yaml").write_text(
            f"method: {method}\ndata: {{train: {find_demo_data('pairs.jsonl')}, held_out: 8, max_tokens: 256}}\n"
            f"model: {{checkpoint: {folder / start}}}\ntrainer: {common}\noutput: {folder / method}\n"
        )
    for method in ("sft", "dpo", "kto"):
        run_training(load_recipe(folder / f"{method}.yaml"))
    return folder


@pytest.fixture
def make_pairs_recipe(make_recipe, tmp_path):
    """Return a function that makes the small recipe for a method, on pairs."""
    lines = find_demo_data("pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:32]), encoding="utf-8")
    (tmp_path / "held_pairs.jsonl").write_text("".join(lines[32:40]), encoding="utf-8")

    def make(name, method, *overrides):
        data = ["data.train=pairs.jsonl", "data.eval=held_pairs.jsonl"]
        return make_recipe(name, f"method={method}", *data, *overrides)

    return make


@pytest.fixture
def unguarded_script(monkeypatch, tmp_path):
    """Let this process look as if it ran a script without `if __name__ == "__main__"`; the script writes the file that is returned."""
    script, ran = ModuleType("__main__"), tmp_path / "ran"
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.setitem(sys.modules, "__main__", script)
    return ran
