"""SFT, pairs of the model's own answers, DPO and the export with one command."""

import contextlib
import json
import shutil

import pytest
from transformers import Trainer

from finetune.check.chain_stages import dump_chain
from finetune.check.chains import load_chain
from finetune.errors import RecipeError
from finetune.exporting import merge
from finetune.files.resources import find_demo_data
from finetune.pipeline.chain import describe_chain, run_chain
from finetune.synthesis.endpoints import endpoint
from finetune.synthesis.endpoints.local_model import LocalModel

CHAIN = """
model: {checkpoint: nano}
data: {train: rows.jsonl, max_tokens: 128}
adapter: {rank: 4, alpha: 8}
answers: 0
trainer:
  max_steps: 2
  learning_rate: 2e-3
  per_device_train_batch_size: 2
  logging_steps: 1
  save_steps: 1
  gradient_checkpointing: false
  disable_tqdm: true
stages:
  - name: sft
  - name: pairs
    synthesize: {job: pairs, samples: 3, temperature: 1.0, max_tokens: 6, rules: {length: 1.0, language: 0.5}, length_tokens: 2}
  - {name: dpo, method: dpo}
  - {name: model, export: {dtype: float32, verify: false}}
"""


@pytest.fixture
def recipe(tmp_path, nano_llama):
    lines = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (tmp_path / "chain.yaml").write_text(CHAIN, encoding="utf-8")
    return tmp_path / "chain.yaml"


def load(recipe, *overrides):
    return load_chain(recipe, [f"output={recipe.parent / 'out'}", *overrides])


class Killed(BaseException):
    """Stands for the end of the process at this place."""


@contextlib.contextmanager
def kill_at(owner, name, number):
    """End the process at a call of a function; give the list of its calls."""
    calls, function = [], getattr(owner, name)

    def count(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, count)
        yield calls


def read_results(output):
    """The bytes of what each stage leaves."""
    files = {
        "sft": "adapter/adapter_model.safetensors",
        "pairs": "rows.jsonl",
        "dpo": "adapter/adapter_model.safetensors",
        "model": "model.safetensors",
    }
    return {stage: (output / stage / file).read_bytes() for stage, file in files.items()}


def test_one_command_trains_on_the_models_own_answers_and_resumes_in_each_stage(recipe, monkeypatch):
    """A chain that is killed once in each stage ends with the bits of one that was not."""
    output = recipe.parent / "out"
    monkeypatch.setattr(endpoint, "find_cache", lambda: recipe.parent / "first")
    run_chain(load(recipe))
    whole = read_results(output)
    shutil.rmtree(output)
    monkeypatch.setattr(endpoint, "find_cache", lambda: recipe.parent / "second")
    kills = [
        (Trainer, "training_step", 2),
        (LocalModel, "ask", 5),
        (Trainer, "training_step", 2),
        (merge, "write_card", 1),
    ]
    for number, kill in enumerate(kills):
        with kill_at(*kill) as calls:
            run_chain(load(recipe), resume=number > 0)
        assert len(calls) == kill[2]
    done = run_chain(load(recipe), resume=True)
    assert [(stage.name, stage.was_done) for stage in done.stages] == [
        ("sft", True),
        ("pairs", True),
        ("dpo", True),
        ("model", False),
    ]
    assert read_results(output) == whole
    rows = [json.loads(line) for line in whole["pairs"].decode().splitlines()]
    assert rows and all(row["provenance"]["scores"]["chosen"] > row["provenance"]["scores"]["rejected"] for row in rows)
    assert {row["provenance"]["model"] for row in rows} == {str(output / "sft")}
    record = json.loads((output / "dpo" / "run.json").read_text(encoding="utf-8"))
    assert record["data"]["train"]["rows"] == len(rows)
    assert f"{output / 'pairs'}: {len(rows)} rows made of 6" in describe_chain(done)
    again = run_chain(load(recipe), resume=True)
    assert all(stage.was_done for stage in again.stages)
    saved = recipe.parent / "saved.yaml"
    saved.write_text(dump_chain(load(recipe)), encoding="utf-8")
    assert dump_chain(load_chain(saved)) == dump_chain(load(recipe))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: dpo}", "method: dpo, data: {train: rows.jsonl}}", "dpo: data.train: this stage trains on the rows"),
        ("  - name: sft\n", "", "pairs: synthesize: no stage before it trains"),
        ("samples: 3", "samples: 1", "pairs: synthesize.samples: must be at least 2"),
        ("job: pairs", "job: pairs, keeps: all", "pairs: synthesize.keeps: unknown key; did you mean 'keep'?"),
        ("- name: pairs\n", "- name: pairs\n    method: dpo\n", "pairs: method: does not belong to a stage that synth"),
    ],
)
def test_what_is_wrong_with_the_stage_is_named_before_anything_trains(recipe, old, new, message):
    recipe.write_text(CHAIN.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load(recipe)
    assert message in str(error.value)
