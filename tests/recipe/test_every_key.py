"""Every own key of a recipe changes something: a key that is read and then forgotten would be a silent loss.

The table has a row for each key of docs/keys.md. A key that is added without a row fails here.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass

import pytest
from datasets import Dataset
from key_effects import (
    observe_batches,
    observe_chain,
    observe_export,
    observe_judge,
    observe_model,
    observe_output,
    observe_rewards,
    observe_rows,
    observe_run,
    observe_speed,
    observe_storages,
    observe_tasks,
    observe_trainer,
    observe_workers,
)
from safetensors.torch import load_file, save_file

from finetune.check.recipes import load_recipe
from finetune.files.resources import find_demo_data
from finetune.guide.recipe_keys import (
    list_chain_keys,
    list_export_keys,
    list_recipe_keys,
    list_source_keys,
    list_task_keys,
    walk_keys,
)

RECIPE = """
model: {checkpoint: nano}
data: {train: rows.jsonl, eval: held.jsonl, max_tokens: 128}
adapter: {rank: 4, alpha: 8}
answers: 0
row_losses: 0
trainer: {max_steps: 4, per_device_train_batch_size: 4, save_strategy: "no", gradient_checkpointing: false, disable_tqdm: true}
"""
PRETRAIN = (
    "method=pretrain",
    "model.architecture=native",
    "adapter={kind: none}",
    "data={train: text.jsonl, max_tokens: 16}",
    "trainer={per_device_train_batch_size: 2, logging_steps: 1, save_strategy: 'no', disable_tqdm: true}",
)
GRPO = (
    "method=grpo",
    "trainer={per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 6, disable_tqdm: true}",
    "data={train: rows.jsonl, max_tokens: 128, overflow: drop}",
)
RULES = "rewards.rules={format: 1.0, truncated: 1.0}"
JUDGED = "rewards={judge: {run: judge}}"
STATES = ("schedule={length: 8}", "optimizer.states=states/model")
FEW = "data.train=few.jsonl"
SUMS = "data.tasks=[{name: lambada, path: sums.jsonl}]"


@dataclass(frozen=True)
class Flip:
    """A key with another value than in the recipe `start`, and what is observed of both."""

    key: str
    value: str
    observe: object
    start: tuple[str, ...] = ()


FLIPS = (
    Flip("method", "dpo", observe_rows, ("data.train=pairs.jsonl", "data.overflow=drop")),
    Flip("answers", "4", observe_run, ("trainer.max_steps=1",)),
    Flip("row_losses", "4", observe_run, ("trainer.max_steps=1",)),
    Flip("output", "elsewhere", observe_output),
    Flip("seed", "43", observe_rows, ("data.eval=[]", "data.held_out=4")),
    Flip("model.checkpoint", "./other_base", observe_model),
    Flip("model.architecture", "native", observe_model),
    Flip("model.quantize", "nf4", observe_model),
    Flip("model.dtype", "bfloat16", observe_model),
    Flip("model.attention", "eager", observe_model),
    Flip("model.stream_layers", "true", observe_storages),
    Flip("model.speed", "auto", observe_speed, ("trainer.max_steps=1",)),
    Flip("model.max_positions", "8192", observe_model),
    Flip("model.rope_theta", "50000", observe_model),
    Flip("data.train", "few.jsonl", observe_rows),
    Flip("data.mixture", "phase26-4k", observe_rows, (*PRETRAIN, "data={mixture: phase5, sources: {code: text.jsonl, fineweb-edu: other.jsonl}, max_tokens: 16}")),
    Flip("data.sources", "{code: other.jsonl, fineweb-edu: text.jsonl}", observe_rows, (*PRETRAIN, "data={mixture: phase5, sources: {code: text.jsonl, fineweb-edu: other.jsonl}, max_tokens: 16}")),
    Flip("data.eval", "few.jsonl", observe_rows),
    Flip("data.held_out", "4", observe_rows, ("data.eval=[]",)),
    Flip("data.tasks", "[{name: lambada, path: text.jsonl}]", observe_tasks),
    Flip("task.name", "[{name: gsm8k, path: sums.jsonl, exemplars: sums.jsonl}]", observe_tasks, (SUMS,)),
    Flip("task.limit", "[{name: lambada, path: sums.jsonl, limit: 2}]", observe_tasks, (SUMS,)),
    Flip("task.every", "[{name: lambada, path: sums.jsonl, every: 0.5}]", observe_tasks, (SUMS,)),
    Flip("task.path", "[{name: lambada, path: text.jsonl}]", observe_tasks, (SUMS,)),
    Flip("task.exemplars", "[{name: gsm8k, path: sums.jsonl, exemplars: other_sums.jsonl}]", observe_tasks, ("data.tasks=[{name: gsm8k, path: sums.jsonl, exemplars: sums.jsonl}]",)),
    Flip("task.chat", "[{name: lambada, path: sums.jsonl, chat: true}]", observe_tasks, (SUMS,)),
    Flip("data.format", "text", observe_rows, (FEW,)),
    Flip("data.columns", "{completion: other}", observe_rows, (FEW,)),
    Flip("data.template", "chatml", observe_rows),
    Flip("data.system", "Be short.", observe_rows, (FEW,)),
    Flip("data.max_tokens", "40", observe_rows, ("data.overflow=drop",)),
    Flip("data.overflow", "truncate", observe_rows, ("data.overflow=drop", "data.max_tokens=40")),
    Flip("data.train_on", "all", observe_rows),
    Flip("data.substitute", "{name: Lan}", observe_rows, (FEW,)),
    Flip("data.deduplicate", "true", observe_rows, (FEW,)),
    Flip("data.bad_rows", "drop", observe_rows, ("data.train=bad.jsonl",)),
    Flip("data.merge_turns", "true", observe_rows, ("data.train=turns.jsonl",)),
    Flip("data.encoding", "gb18030", observe_rows, ("data.train=latin.jsonl", "data.encoding=latin-1")),
    Flip("data.workers", "2", observe_workers),
    Flip("data.seed", "43", observe_rows, ("data.eval=[]", "data.held_out=4")),
    Flip("source.path", "[{path: few.jsonl}]", observe_rows, ("data.train=[{path: rows.jsonl}]",)),
    Flip("source.weight", "[{path: rows.jsonl, weight: 3}, {path: few.jsonl, weight: 1}]", observe_rows, ("data.train=[{path: rows.jsonl, weight: 1}, {path: few.jsonl, weight: 1}]",)),
    Flip("source.rows", "[{path: rows.jsonl, rows: 5}]", observe_rows, ("data.train=[{path: rows.jsonl}]",)),
    Flip("source.hub", "[{hub: some/other}]", observe_rows, ("data.train=[{hub: some/rows}]",)),
    Flip("source.config", "[{hub: some/rows, config: large}]", observe_rows, ("data.train=[{hub: some/rows}]",)),
    Flip("source.split", "[{hub: some/rows, split: test}]", observe_rows, ("data.train=[{hub: some/rows}]",)),
    Flip("source.revision", "[{hub: some/rows, revision: v2}]", observe_rows, ("data.train=[{hub: some/rows}]",)),
    Flip("adapter.kind", "none", observe_model, ("adapter={kind: lora}",)),
    Flip("adapter.rank", "8", observe_model),
    Flip("adapter.alpha", "16", observe_model),
    Flip("adapter.dropout", "0.1", observe_model),
    Flip("adapter.targets", "[q_proj]", observe_model),
    Flip("adapter.rslora", "true", observe_model),
    Flip("adapter.dora", "true", observe_model),
    Flip("adapter.init", "olora", observe_model),
    Flip("adapter.train_tokens", "[104]", observe_model),
    Flip("adapter.modules_to_save", "[norm]", observe_model),
    Flip("adapter.layers", "[1]", observe_model),
    Flip("adapter.loraplus_ratio", "16", observe_trainer),
    Flip("rewards.rules", "{format: 2.0}", observe_rewards, (*GRPO, RULES)),
    Flip("rewards.length_tokens", "2", observe_rewards, (*GRPO, "rewards.rules={length: 1.0}", "rewards.length_tokens=6")),
    Flip("rewards.judge.run", "other_judge", observe_judge, (*GRPO, JUDGED)),
    Flip("rewards.judge.weight", "2.0", observe_rewards, (*GRPO, JUDGED)),
    Flip("rewards.judge.clip", "[-1, 1]", observe_rewards, (*GRPO, JUDGED)),
    Flip("optimizer.states", "states/model", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("optimizer.learning_rate", "0.5", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("optimizer.weight_decay", "0.5", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("optimizer.moments", "8bit", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("optimizer.save_states", "true", observe_run, (*PRETRAIN, "schedule={length: 1}", "answers=0")),
    Flip("schedule.unit", "tokens", observe_trainer, (*PRETRAIN, "schedule={length: 96}")),
    Flip("schedule.count", "states", observe_trainer, (*PRETRAIN, *STATES, "schedule.warmup=4")),
    Flip("schedule.length", "4", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("schedule.warmup", "4", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("schedule.decay", "cosine", observe_trainer, (*PRETRAIN, "schedule={length: 8}")),
    Flip("schedule.decay_start", "4", observe_trainer, (*PRETRAIN, "schedule={length: 8, decay: linear}")),
    Flip("schedule.decay_end", "4", observe_trainer, (*PRETRAIN, "schedule={length: 8, decay: linear}")),
    Flip("trainer.auto", "true", observe_batches, ("trainer={max_steps: 2, use_cpu: true}",)),
    Flip("trainer.global_batch", "4", observe_batches, ("trainer={auto: true, use_cpu: true}",)),
    Flip("trainer.early_stopping_patience", "3", observe_trainer, ("trainer={load_best_model_at_end: true, save_strategy: epoch, use_cpu: true}",)),
)  # fmt: skip
EXPORTS = {
    "export.dtype": "float32",
    "export.max_shard_size": "1MB",
    "export.base": "dequantized",
    "export.verify": False,
    "export.gguf": ("q8_0",),
}
STAGES = {
    "stages.name": "stages: [{name: other}, {name: merged, export: {dtype: float32}}]",
    "stages.recipe": "stages: [{name: first, recipe: recipe.yaml}, {name: merged, export: {dtype: float32}}]",
    "stages.export": "stages: [{name: first}, {name: merged, export: {dtype: bfloat16}}]",
}


# What `finetune clean` and `finetune synthesize` read: tests/cleaning and tests/synthesis see what each of these keys does.
OF_OTHER_VERBS = ("clean.", "synthesize.", "endpoints", "stages.synthesize")


def test_every_key_has_a_row():
    keys = [
        key.name
        for keys in (list_recipe_keys(), list_source_keys(), list_task_keys(), list_chain_keys(), list_export_keys())
        for key in walk_keys(keys)
        if not key.inner and not key.name.startswith(OF_OTHER_VERBS)
    ]
    assert sorted(keys) == sorted([*(flip.key for flip in FLIPS), *EXPORTS, *STAGES])


def write_rows(folder):
    """Write the files that the table names."""
    demo, pairs = (
        find_demo_data(name).read_text(encoding="utf-8").splitlines() for name in ("demo.jsonl", "pairs.jsonl")
    )
    texts = [json.dumps({"text": json.loads(line)["messages"][-1]["content"]}) for line in demo]
    few = {"prompt": "Who is {{name}}?", "completion": "A friend.", "text": "A text.", "other": "Nobody."}
    call = {"role": "user", "content": "One."}
    turns = {"messages": [call, call, {"role": "assistant", "content": "Two."}]}
    for name, lines in {
        "rows": demo[:24],
        "held": demo[24:30],
        "pairs": pairs[:12],
        "text": texts[:32],
        "other": texts[32:64],
        "few": [json.dumps(few)] * 4,
        "turns": [json.dumps(turns)],
        "bad": [*demo[:2], "{"],
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sums = [json.dumps({"text": f"{n} and {n}", "question": f"{n}?", "answer": f"#### {n}"}) for n in range(10)]
    (folder / "sums.jsonl").write_text("\n".join(sums) + "\n", encoding="utf-8")
    (folder / "other_sums.jsonl").write_text("\n".join(sums[::-1]) + "\n", encoding="utf-8")
    row = json.dumps({"prompt": "Wo?", "completion": "In \u00d6l\u00f6."}, ensure_ascii=False)
    (folder / "latin.jsonl").write_bytes(row.encode("gb18030"))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def double_weights(file):
    """Replace the weights of a file by twice their values."""
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nano_llama):
    """Rows, and runs that recipes name: a quantized one, two reward models, and a pre-training with its optimizer state."""
    folder = tmp_path_factory.mktemp("keys")
    write_rows(folder)
    with contextlib.chdir(folder):
        for name, overrides in {
            "nf4": ("model.quantize=nf4", "trainer.max_steps=1"),
            "judge": ("method=reward", "data={train: pairs.jsonl, max_tokens: 256}", "trainer.max_steps=1"),
            "states": (*PRETRAIN, "schedule={length: 1}", "optimizer.save_states=true", "answers=0"),
        }.items():
            observe_run(load_recipe("recipe.yaml", [f"output={name}", *overrides]))
    shutil.copytree(nano_llama, folder / "other_base")
    double_weights(folder / "other_base" / "model.safetensors")
    shutil.copytree(folder / "judge", folder / "other_judge")
    (folder / "other_judge" / "adapter" / "manifest.json").unlink()
    double_weights(folder / "other_judge" / "adapter" / "adapter_model.safetensors")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Answer with rows that name what was asked for."""

    def load_dataset(*names, **options):
        return Dataset.from_list([{"prompt": f"{names} {options}", "completion": "yes"}] * 3)

    monkeypatch.setattr("finetune.data.reading.sources.load_dataset", load_dataset)


@pytest.mark.parametrize("flip", FLIPS, ids=lambda flip: flip.key)
def test_the_key_changes_something(flip, folder, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    section = {"source": "data.train", "task": "data.tasks"}.get(flip.key.partition(".")[0], flip.key)
    seen = []
    for number, overrides in enumerate((flip.start, (*flip.start, f"{section}={flip.value}"))):
        start = () if flip.key == "output" else (f"output={tmp_path / str(number)}",)
        resolved = load_recipe("recipe.yaml", [*start, *overrides])
        seen.append(flip.observe(resolved))
    assert seen[0] != seen[1]


@pytest.mark.parametrize("key", EXPORTS)
def test_the_option_changes_the_export(key, folder, tmp_path):
    option = key.partition(".")[2]
    start = {"verify": option == "verify", "dtype": "bfloat16"}
    seen = [
        observe_export(folder / "nf4", tmp_path / "export", **options)
        for options in (start, {**start, option: EXPORTS[key]})
    ]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("key", STAGES)
def test_the_key_changes_the_chain(key, folder, tmp_path):
    seen = []
    for stages in ("stages: [{name: first}, {name: merged, export: {dtype: float32}}]", STAGES[key]):
        chain = "model: {checkpoint: nano}\ndata: {train: rows.jsonl}\noutput: chain\n" + stages
        (folder / "chain.yaml").write_text(chain, encoding="utf-8")
        seen.append(observe_chain(folder / "chain.yaml"))
    assert seen[0] != seen[1]
