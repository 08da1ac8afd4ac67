"""SFT, pairs of the model's own answers, DPO and the export with one command."""

import json

import pytest

from finetune.check.chain_stages import dump_chain
from finetune.check.chains import load_chain
from finetune.errors import EndpointError, RecipeError
from finetune.files.resources import find_demo_data
from finetune.pipeline import chain as module
from finetune.pipeline.chain import describe_chain, run_chain

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
  save_strategy: "no"
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


def test_one_command_trains_on_the_models_own_answers_and_resumes(recipe, monkeypatch):
    write, output = module.synthesize_rows, recipe.parent / "out"

    def stop(*_):
        raise EndpointError("stopped here")

    monkeypatch.setattr(module, "synthesize_rows", stop)
    with pytest.raises(EndpointError):
        run_chain(load(recipe))
    monkeypatch.setattr(module, "synthesize_rows", write)
    done = run_chain(load(recipe), resume=True)
    assert [(stage.name, stage.was_done) for stage in done.stages] == [
        ("sft", True),
        ("pairs", False),
        ("dpo", False),
        ("model", False),
    ]
    rows = [json.loads(line) for line in (output / "pairs" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
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
