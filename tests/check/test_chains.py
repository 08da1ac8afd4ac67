"""Chains as they are read: what a stage inherits, what it may say, and that every problem is told with its stage."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune.check.chain_stages import ExportStage, TrainStage, dump_chain
from finetune.check.chains import load_chain, resolve_stage
from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.recipe.sections import LINEAR_LAYERS, SourceSection, dump_recipe
from finetune.runs.results import Lineage, write_lineage

CHAIN = """
model: {checkpoint: nano, quantize: nf4}
data: {train: rows.jsonl, max_tokens: 128}
trainer: {learning_rate: 2e-3, max_steps: 4}
seed: 7
output: runs/chain
stages:
  - name: first
    adapter: {rank: 4}
  - name: second
    data: {train: other.jsonl}
    trainer: {learning_rate: 1e-4}
  - name: early
    export: {dtype: bfloat16}
  - {name: third, seed: 8}
  - {name: final, export: {}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a chain beside two data files, from where the command then runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"prompt": "q", "completion": "a"}\n', encoding="utf-8")

    def make(text=CHAIN):
        path = tmp_path / "chain.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def list_problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_chain(path, overrides)
    return caught.value.problems


def test_stages_inherit_and_follow_each_other(write, tmp_path):
    chain = load_chain(write())
    first, second, early, _, final = chain.stages
    assert [type(stage) for stage in chain.stages] == [TrainStage, TrainStage, ExportStage, TrainStage, ExportStage]
    output = tmp_path / "runs" / "chain"
    assert chain.output == output
    assert [stage.recipe.output for stage in chain.trainings] == [str(output / n) for n in ("first", "second", "third")]
    assert [stage.run_recipe.model.checkpoint for stage in chain.trainings] == [
        "nano",
        str(output / "first"),
        str(output / "second"),
    ]
    assert {stage.recipe.model.quantize for stage in chain.trainings} == {"nf4"}
    # The adapter goes on, so its form is that of the first stage.
    assert [stage.recipe.adapter.rank for stage in chain.trainings] == [4, 4, 4]
    assert first.recipe.adapter.rank == 4
    # A section is laid over the shared one key by key.
    assert second.recipe.trainer["learning_rate"] == 1e-4
    assert second.recipe.trainer["max_steps"] == 4
    assert first.recipe.data.train == (str(tmp_path / "rows.jsonl"),)
    assert second.recipe.data.train == (str(tmp_path / "other.jsonl"),)
    assert second.recipe.data.max_tokens == 128
    assert [stage.recipe.seed for stage in chain.trainings] == [7, 7, 8]
    assert (early.run, early.output, early.settings.dtype) == (output / "second", output / "early", "bfloat16")
    assert (final.run, final.settings.dtype) == (output / "third", "auto")


def test_overrides_reach_every_stage_or_one(write, tmp_path):
    chain = load_chain(
        write(),
        [
            "trainer.learning_rate=1e-5",
            "stages.third.trainer.max_steps=9",
            "stages.final.export.dtype=float32",
            "model.checkpoint=base",
            f"output={tmp_path / 'there'}",
        ],
    )
    assert [stage.recipe.trainer["learning_rate"] for stage in chain.trainings] == [1e-5] * 3
    assert [stage.recipe.trainer["max_steps"] for stage in chain.trainings] == [4, 4, 9]
    assert chain.stages[-1].settings.dtype == "float32"
    assert chain.trainings[0].run_recipe.model.checkpoint == "base"
    assert chain.trainings[1].run_recipe.model.checkpoint == str(tmp_path / "there" / "first")


def test_the_resolved_chain_reads_as_the_same_chain(write, tmp_path):
    chain = load_chain(write())
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_chain(chain), encoding="utf-8")
    again = load_chain(saved)
    assert again.stages == chain.stages
    assert dump_chain(again) == dump_chain(chain)


def test_a_stage_may_name_a_recipe(write, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.jsonl").write_text('{"prompt": "q", "completion": "a"}\n', encoding="utf-8")
    (tmp_path / "sub" / "mine.yaml").write_text(
        "data: {train: mine.jsonl, max_tokens: 64}\ntrainer: {learning_rate: 3e-4, warmup_steps: 5}\noutput: elsewhere\n",
        encoding="utf-8",
    )
    path = write(
        "model: {checkpoint: nano}\nstages:\n"
        "  - {name: one, recipe: sub/mine.yaml, trainer: {learning_rate: 1e-3}}\n"
        "  - {name: two, recipe: sft_lora, data: {train: rows.jsonl}}\n"
    )
    one, two = load_chain(path).stages
    assert one.recipe.data.train == (str(tmp_path / "sub" / "mine.jsonl"),)
    assert one.recipe.trainer["learning_rate"] == 1e-3
    assert one.recipe.trainer["warmup_steps"] == 5
    assert one.recipe.output == str(tmp_path / "runs" / "chain" / "one")
    assert two.recipe.trainer["learning_rate"] == load_recipe(Path("sft_lora")).recipe.trainer["learning_rate"]
    assert two.recipe.model.checkpoint == "nano"  # the top of the chain stands above a named recipe


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("[mine.jsonl]", ("{}",)),
        ("[{path: mine.jsonl, rows: 1}, mine.jsonl]", (SourceSection(path="{}", rows=1), "{}")),
        ("[{hub: owner/mine, rows: 1}]", (SourceSection(hub="owner/mine", rows=1),)),
    ],
)
def test_rows_of_a_named_recipe_are_found_beside_it(write, tmp_path, train, expected):
    """Only a single path was; a list or a mapping was looked for beside the chain."""
    (tmp_path / "sub").mkdir()
    rows = tmp_path / "sub" / "mine.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n', encoding="utf-8")
    (tmp_path / "sub" / "mine.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "sub" / "mine.yaml").write_text(
        f"data: {{train: {train}, max_tokens: 64, template: mine.jinja}}\n", encoding="utf-8"
    )
    chain = load_chain(write("model: {checkpoint: nano}\nstages: [{name: one, recipe: sub/mine.yaml}]\n"))
    found = [
        source.format(rows) if isinstance(source, str) else replace(source, path=source.path.format(rows))
        for source in expected
    ]
    assert list(chain.trainings[0].recipe.data.train) == found
    assert chain.trainings[0].recipe.data.template == str(tmp_path / "sub" / "mine.jinja")


def test_every_problem_is_told_with_its_stage(write):
    path = write(
        """
model: {checkpoint: nano}
data: {train: rows.jsonl}
stages:
  - {name: one, trainer: {lerning_rate: 1e-3}, output: here}
  - {name: two, data: {train: missing.jsonl}, model: {checkpoint: base}}
  - {name: out, export: {dtyp: float32}, seed: 3}
  - {name: one, seed: 5}
  - {name: "../up"}
  - just text
"""
    )
    problems = list_problems(path, "stages.tow.seed=1")
    assert problems[0] == "stages[4]: the name one stands twice; give every stage its own"
    assert problems[1].startswith(
        "stages[5]: needs a name of letters, digits, - and _, which also names its folder; found '../up'"
    )
    assert problems[2].startswith("stages[6]: needs a name")
    assert problems[3] == "one: output: a stage writes to the folder one in the chain's output; remove this key"
    assert problems[4] == "one: trainer.lerning_rate: unknown key; did you mean 'learning_rate'?"
    assert problems[5] == "two: model.checkpoint: this stage continues from the stage before; remove this key"
    assert problems[6].startswith("two: data.train: missing.jsonl does not exist")
    assert problems[7] == "out: seed: does not belong to a stage that exports; remove it"
    assert problems[8] == "out: export.dtyp: unknown key; did you mean 'dtype'?"
    assert problems[9] == "--set stages.tow.seed=1: the stage 'tow' is unknown; did you mean 'two'?"
    assert len(problems) == 10


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("[]", "stages: must be a list of stages, each with a name"),
        ("sft", "stages: must be a list of stages, each with a name"),
        ("[{name: out, export: {}}]", "out: export: no stage before it trains, so there is nothing to export"),
        ("[{name: a, recipe: nothing.yaml}]", "a: recipe: nothing.yaml: there is no such file"),
        ("[{name: a}, {name: out, export: [1]}]", "out: export: must be a section of keys and values"),
        ("[{name: a}, {name: b, export: {max_shard_size: large}}]", "b: export.max_shard_size: "),
        ("[{name: a}, {name: b, export: {gguf: [q4_k_m]}}]", "b: export.gguf: q4_k_m stores blocks of 256 values"),
        # These showed only after the stage before had been trained.
        ("[{name: a, method: reward}, {name: b, method: dpo}]", "b: method: the stage before trains a reward model"),
        ("[{name: a, method: reward}, {name: b, export: {}}]", "b: export: the stage before trains a reward model"),
        ("[{name: a}, {name: b, export: {base: dequantized}}]", "b: export.base: dequantized is for adapters"),
        (
            "[{name: a, model: {quantize: nf4}}, {name: b, export: {base: auto, verify: false}}]",
            "b: export.base: auto chooses by measuring",
        ),
        # The reference lacked the trained token rows, without a word.
        (
            "[{name: a, adapter: {train_tokens: [5]}}, {name: b, method: dpo, trainer: {precompute_ref_log_probs: true}}]",
            "b: trainer.precompute_ref_log_probs: TRL computes these before it knows",
        ),
    ],
)
def test_each_mistake_has_its_own_sentence(write, stages, problem):
    path = write(f"model: {{checkpoint: nano}}\ndata: {{train: rows.jsonl}}\nstages: {stages}\n")
    found = list_problems(path)
    assert any(entry.startswith(problem) for entry in found), found


def test_a_plain_recipe_is_a_chain_of_one_stage(write, tmp_path):
    assert load_chain(write()).single is None
    path = write("data: {train: rows.jsonl}\noutput: runs/mine\n")
    chain = load_chain(path, ["seed=3"])
    assert chain.single.resolved == load_recipe(path, ["seed=3"])
    assert chain.output == tmp_path / "runs" / "mine"
    assert dump_chain(chain) == dump_recipe(chain.single.recipe)
    for broken in (tmp_path / "missing.yaml", write("][")):
        with pytest.raises(RecipeError):
            load_chain(broken)


def test_check_reads_a_chain_without_torch(write):
    code = (
        "import sys; from finetune.cli.main import main\n"
        "try: main(['check', sys.argv[1], '--json'])\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(write())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    assert found["ok"]
    assert [stage["name"] for stage in found["recipe"]["stages"]] == ["first", "second", "early", "third", "final"]


CONTINUED = """
model: {checkpoint: nano, max_positions: 512}
data: {train: rows.jsonl}
stages:
  - {name: first, adapter: {rank: 4}}
  - {name: second, model: {max_positions: 2048, rope_theta: 980000.0}}
"""


def test_a_later_stage_keeps_its_own_positions(write, tmp_path):
    """It lost `max_positions` and `rope_theta` without a word: its run took those of the adapter that it continues."""
    first, second = load_chain(write(CONTINUED)).trainings
    assert (first.recipe.model.max_positions, first.recipe.model.rope_theta) == (512, None)
    assert (second.recipe.model.max_positions, second.recipe.model.rope_theta) == (2048, 980000.0)
    write_adapter(second.follows, max_positions=512)
    run = resolve_stage(second).recipe
    assert run.model.checkpoint == str(tmp_path / "runs" / "chain" / "first")
    assert (run.model.max_positions, run.model.rope_theta, run.adapter.rank) == (2048, 980000.0, 4)


def test_a_later_stage_adopts_positions_that_it_does_not_set(write):
    path = write(CONTINUED.replace("model: {max_positions: 2048, rope_theta: 980000.0}", "seed: 3"))
    second = load_chain(path, ["model.max_positions=null", "stages.first.model.max_positions=777"]).trainings[1]
    assert second.recipe.model.max_positions is None  # set for every stage by the command line
    path.write_text(path.read_text().replace(", max_positions: 512", ""), encoding="utf-8")
    second = load_chain(path, ["stages.first.model.max_positions=777"]).trainings[1]
    assert second.recipe.model.max_positions == 777
    write_adapter(second.follows, max_positions=777)
    assert resolve_stage(second).recipe.model.max_positions == 777


def test_a_later_stage_may_not_change_the_adapter_that_it_continues(write):
    path = write(CONTINUED.replace("{max_positions: 2048, rope_theta: 980000.0}", "{quantize: nf4}"))
    assert list_problems(path, "stages.second.adapter.rank=8") == [
        "second: adapter.rank: the stage before was trained with 4, and its adapter must keep that; set that, or remove this key; found 8",
        "second: model.quantize: the stage before was trained with none, and its adapter must keep that; set that, or remove this key; found nf4",
    ]


def write_adapter(run, max_positions, **saved):
    """Write what a finished run leaves, without its weights."""
    folder = run / "adapter"
    folder.mkdir(parents=True)
    config = {"r": 4, "lora_alpha": 32, "target_modules": list(LINEAR_LAYERS), **saved}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    lineage = Lineage("nano", "base", "0", "none", "float32", "chatml", "0", "sft", max_positions=max_positions)
    write_lineage(folder, lineage, [])


@pytest.mark.parametrize(
    ("adapter", "saved", "adopted"),
    [
        # PiSSA's adapter is saved as plain LoRA of twice the rank.
        ("rank: 4, init: pissa", {"r": 8, "lora_alpha": 64}, (8, 64)),
        # All seven layers by name are what `all-linear` stands for.
        (f"rank: 4, targets: [{', '.join(LINEAR_LAYERS)}]", {}, (4, 32)),
    ],
)
def test_a_chain_that_passes_the_check_is_run_to_its_end(write, adapter, saved, adopted):
    """The second stage was refused for a key that all stages share, when the first had been trained."""
    text = f"model: {{checkpoint: nano}}\ndata: {{train: rows.jsonl}}\nadapter: {{{adapter}}}\nstages: [{{name: a}}, {{name: b}}]\n"
    second = load_chain(write(text)).trainings[1]
    assert (second.recipe.adapter.rank, second.recipe.adapter.alpha, second.recipe.adapter.init) == (
        *adopted,
        "default",
    )
    write_adapter(second.follows, max_positions=None, **saved)
    run = resolve_stage(second).recipe
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.targets) == (*adopted, ("all-linear",))


def test_a_chain_within_a_chain_is_one_problem(write):
    path = write("model: {checkpoint: nano}\nstages: [{name: a, recipe: instruct, data: {train: rows.jsonl}}]\n")
    assert list_problems(path) == ["a: recipe: instruct is itself a chain; name a recipe of one run"]
