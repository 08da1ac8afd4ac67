"""Pre-training on nano: packed rows, muP groups, the schedule, and a result that can be published and continued."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.check.recipes import load_recipe
from finetune.errors import FinetuneError, RecipeError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.resources import find_demo_data
from finetune.models.opening import open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.pretraining import packed_documents
from finetune.training.run import run_training
from finetune.yulan.states.optimizer_states import open_states, read_state

RECIPE = """
method: pretrain
model: {checkpoint: nano, architecture: native}
data: {train: text.jsonl, eval: held.jsonl, max_tokens: 32}
adapter: {kind: none}
schedule: {length: 4, warmup: 1}
trainer:
  per_device_train_batch_size: 2
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""

TUNING = """
method: sft
data: {train: chats.jsonl, max_tokens: 128}
adapter: {rank: 4}
trainer: {max_steps: 2, per_device_train_batch_size: 2, save_strategy: "no", disable_tqdm: true}
"""


@pytest.fixture
def make_recipe(tmp_path, nano):
    """Return a function that checks the small recipe with overrides; its run lies in `tmp_path/<name>`."""
    rows = [json.loads(line) for line in find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    texts = [json.dumps({"text": row["messages"][-1]["content"]}) for row in rows]
    (tmp_path / "text.jsonl").write_text("\n".join(texts[:32]), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text("\n".join(texts[32:]), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make(name, *overrides):
        return load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / name}", *overrides])

    return make


def read_metrics(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture
def tokens(tmp_path, nano):
    """A file of rows of 32 tokens, of which each fills a packed row; the first half and the second half stand alone too."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(110, 1273, (8, 32), generator=generator).tolist()
    for name, part in (("all", rows), ("first", rows[:4]), ("second", rows[4:])):
        lines = [json.dumps({"input_ids": row}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_goes_on_from_another_is_one_run(train, tokens, dtype):
    common = ["trainer.train_sampling_strategy=sequential", "schedule.warmup=0", f"model.dtype={dtype}"]
    common += ["optimizer.save_states=true", "optimizer.learning_rate=1e-3"]
    whole = train("whole", *common, f"data.train={tokens / 'all.jsonl'}", "data.eval=[]")
    first = train("first", *common, f"data.train={tokens / 'first.jsonl'}", "schedule.length=2", "data.eval=[]")
    assert read_metrics(first, "loss") == read_metrics(whole, "loss")[:2]
    goes_on = [*common[:-1], "optimizer.learning_rate=null", "optimizer.states=published", "schedule.length=2"]
    second = train(
        "second",
        *goes_on,
        f"model.checkpoint={first / 'model'}",
        f"data.train={tokens / 'second.jsonl'}",
        "data.eval=[]",
    )
    assert read_metrics(second, "loss") == read_metrics(whole, "loss")[2:]
    one, other = open_states(whole / "model"), open_states(second / "model")
    assert one.step == other.step == 4
    assert [(group.lr, group.weight_decay) for group in other.groups] == [
        (1e-3 * 256 / 320, 0.1),
        (1e-3, 0.1),
        (1e-3, 0.0),
    ]
    for name, shape in one.shapes.items():
        states = [read_state(opened, name, torch.Size(shape)) for opened in (one, other)]
        assert torch.equal(states[0].weight, states[1].weight)
        assert torch.equal(states[0].exp_avg_sq, states[1].exp_avg_sq)


def test_a_kernel_without_a_mask_is_told_where_documents_begin(train, monkeypatch):
    """A recipe's own flash kernel read positions only of one row; in batches of two, documents saw those before them."""
    seen, prepare = [], packed_documents.prepare_fa_kwargs_from_position_ids
    monkeypatch.setattr(packed_documents, "_MASKED", frozenset())  # so that the processor's kernel is told as well
    monkeypatch.setattr(
        packed_documents,
        "prepare_fa_kwargs_from_position_ids",
        lambda positions: seen.append(positions) or prepare(positions),
    )
    train("run", "schedule.length=1", "schedule.warmup=0", "data.eval=[]")
    (positions,) = seen
    assert positions.shape == (2, 32)
    assert (positions == 0).sum() > 2


def test_a_result_is_exported_evaluated_and_tuned_further(train, make_recipe, tmp_path):
    saves = ("trainer.save_strategy=steps", "trainer.save_steps=4")
    run = train("run", "model.max_positions=4096", "model.rope_theta=490000", "optimizer.learning_rate=1e-3", *saves)
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (4096, 490000.0)
    report = export_result(open_result(run), tmp_path / "export", ExportSettings("auto", "2GB"), LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    assert json.loads((tmp_path / "export" / "config.json").read_text())["rope_theta"] == 490000.0
    # The logged norm of the head is that of the folded one, with its factors, but for the rounding of the export.
    head = load_file(tmp_path / "export" / "model.safetensors")["lm_head.weight"]
    assert read_metrics(run, "lm_head_norm")[-1] == pytest.approx(float(head.double().norm()), rel=1e-5)
    assert len(read_metrics(run, "z_term")) == len(read_metrics(run, "loss")) == 4
    # A resumed run whose metrics.jsonl was removed takes them from its checkpoint.
    states = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [one["z_term"] for one in states if "lm_head_norm" in one] == read_metrics(run, "z_term")
    rows = "\n".join(find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines()[:4])
    (tmp_path / "chats.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "sft.yaml").write_text(TUNING, encoding="utf-8")
    tuned = load_recipe(tmp_path / "sft.yaml", [f"model.checkpoint={run}", f"output={tmp_path / 'tuned'}"])
    summary = run_training(tuned)
    origin = open_result(Path(summary.run)).lineage
    assert origin.describe_chain() == "nano → pretrain → sft"
    assert (summary.steps, origin.architecture) == (2, "llama")


def test_an_adapter_keeps_the_positions_that_it_was_trained_with(train, make_recipe, tmp_path):
    """It was exported with those of its base: an adapter's folder has no configuration that could tell others."""
    adapter = [
        "adapter.kind=lora",
        "optimizer.learning_rate=1e-2",
        "model.max_positions=4096",
        "model.rope_theta=490000",
    ]
    run = train("run", *adapter)
    assert read_metrics(run, "loss")[-1] < read_metrics(run, "loss")[0]
    result, output = open_result(run), tmp_path / "export"
    export_result(result, output, ExportSettings("float32", "2GB"), LogitVerifier())
    config = json.loads((output / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (4096, 490000.0)
    ids = torch.tensor([result.rows[0].input_ids])
    with torch.inference_mode():
        trained, exported = (open_model(str(name)).model(ids).logits for name in (run, output))
    torch.testing.assert_close(trained, exported, atol=1e-4, rtol=0)
    goes_on = make_recipe("next", *adapter[:2], f"model.checkpoint={run}").recipe.model
    assert (goes_on.max_positions, goes_on.rope_theta) == (4096, 490000.0)
    further = make_recipe("next", *adapter[:2], f"model.checkpoint={run}", "model.max_positions=8192").recipe.model
    assert (further.max_positions, further.rope_theta) == (8192, 490000.0)


def test_what_does_not_go_together_is_told_at_once(make_recipe, tmp_path):
    with pytest.raises(RecipeError) as caught:
        make_recipe(
            "run",
            "data.overflow=split",
            "optimizer.states=published",
            "optimizer.learning_rate=1e-3",
            "schedule.decay_end=3",
            "schedule.count=states",
            "schedule.unit=tokens",
            "trainer.max_steps=3",
            "trainer.lr_scheduler_type=cosine",
        )
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert set(keys) == {
        "data.overflow",
        "optimizer.learning_rate",
        "schedule.decay_end",
        "schedule.count",
        "trainer.max_steps",
        "trainer.lr_scheduler_type",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_tokens=4096"], "exceeds the 2,048 positions"),
        (["optimizer.states=published"], "holds no optimizer state "),
        (["schedule.decay=linear", "schedule.decay_end=1"], "is empty, or ends before this run begins"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(make_recipe, tmp_path, overrides, message):
    with pytest.raises(FinetuneError, match=message):
        run_training(make_recipe("run", *overrides))
    assert not (tmp_path / "run").exists()
