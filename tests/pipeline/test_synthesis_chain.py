"""SFT, pairs of the model's own answers, DPO and the export with one command."""

import contextlib
import json
import shutil

import pytest
from transformers import Trainer

from finetune.check.chain_stages import dump_chain
from finetune.check.chains import load_chain
from finetune.errors import DataError, RecipeError
from finetune.exporting import merge
from finetune.files.resources import find_demo_data
from finetune.models.opening import LoadedModel, Reply
from finetune.pipeline.chain import describe_chain, run_chain
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.synthesis.endpoints import endpoint
from finetune.synthesis.endpoints.local_model import LocalModel
from finetune.synthesis.endpoints.questioning import Request, Skip, Written
from finetune.training.training_rows import prepare_rows

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
        assert len(calls) >= kill[2]  # another thread may have asked before the stop reached it
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


def test_rows_that_nobody_has_seen_are_left_out_where_they_are_too_long(recipe):
    """The pairs that stand for the rows were refused as too long, and ended the chain before stage 1."""
    dpo = load(recipe, "data.max_tokens=64").trainings[-1]
    report = prepare_rows(dpo.resolved)[1].report
    assert "23 rows are longer than data.max_tokens: 64 and left out (data.overflow: drop)" in report.notes
    assert dpo.run_recipe.data.overflow == "drop"  # so are the written ones
    assert load(recipe, "data.overflow=error").trainings[-1].recipe.data.overflow == "error"
    assert load(recipe).trainings[0].recipe.data.overflow == "error"


def test_a_stage_without_a_row_is_named_with_what_to_do(recipe, monkeypatch):
    monkeypatch.setattr(endpoint, "find_cache", lambda: recipe.parent / "first")
    monkeypatch.setattr(LocalModel, "ask", lambda self, request: Written("Yes.", 1, 1, False))
    with pytest.raises(DataError) as error:
        run_chain(load(recipe, "trainer.max_steps=1"))
    assert str(error.value).startswith(
        "stage pairs: synthesize: no row was made (6 tie), and nothing was written; raise"
    )
    assert "synthesize.temperature" in str(error.value) and not (recipe.parent / "out" / "pairs").exists()


def test_an_answer_that_spells_a_control_token_is_left_out(nano_llama, monkeypatch):
    """Its letters are other tokens than those that were drawn."""
    model = LocalModel(EndpointSection(model=str(nano_llama)))
    replies = iter(["It is <|eot_id|> so.", "It is so."])
    monkeypatch.setattr(LoadedModel, "answer", lambda self, *arguments: Reply(next(replies), 4, "max_tokens"))
    found = [model.ask(Request((("user", "Why?"),), 8, 1.0, number)) for number in range(2)]
    assert found == [Skip("control token as text", "It is <|eot_id|> so."), Written("It is so.", 0, 4, True)]


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
