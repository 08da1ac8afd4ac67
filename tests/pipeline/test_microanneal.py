"""`finetune microanneal`: a candidate that must win and one that must lose, what both runs read, kills, mistakes."""

import json
import random
from itertools import chain
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

import finetune
from finetune.check.recipes import load_recipe
from finetune.cli.main import main
from finetune.errors import ArgumentError, DataError, FinetuneError
from finetune.pipeline.microanneal import anneal_run
from finetune.pipeline.microanneal.anneal_plan import AnnealRequest, plan_anneal
from finetune.pipeline.microanneal.anneal_results import RowLosses, compare_losses
from finetune.pipeline.microanneal.anneal_rows import prepare_anneal_rows
from finetune.recipe.sections import to_plain
from finetune.training import run as training
from finetune.training.run import run_training
from finetune.training.training_rows import prepare_rows

RECIPE = """
method: anneal
model: {checkpoint: nano, architecture: native}
data: {train: web.jsonl, train_on: all, max_tokens: 64}
adapter: {kind: none}
optimizer: {states: fresh}
answers: 0
trainer: {per_device_train_batch_size: 4, gradient_checkpointing: false, disable_tqdm: true}
"""
TUNING = """
model: {checkpoint: nano}
data: {train: web.jsonl, held_out: 4, max_tokens: 128}
adapter: {rank: 4, targets: [q_proj]}
answers: 0
trainer: {max_steps: 1, per_device_train_batch_size: 2, save_strategy: "no", gradient_checkpointing: false, disable_tqdm: true}
"""
ANIMALS, PLACES = ["cat", "dog", "horse", "goose"], ["market", "garden", "library", "school"]


def write_texts(name, texts):
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_story(draw):
    return " ".join(f"The {draw.choice(ANIMALS)} went to the {draw.choice(PLACES)}." for _ in range(6))


def write_sums(draw):
    return " ".join(f"{a} + {b} = {a + b}." for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(4)))


def write_noise(draw):
    return "".join(draw.choice("qxzjkvwy{}<>#%") for _ in range(90))


@pytest.fixture
def texts(tmp_path, monkeypatch, nano):
    """The old mixture (stories), held-out stories and sums, and three candidates: sums, noise, and the held-out rows themselves."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    write_texts("web.jsonl", [write_story(draw) for _ in range(60)])
    write_texts("sums.jsonl", [write_sums(draw) for _ in range(60)])
    write_texts("noise.jsonl", [write_noise(draw) for _ in range(60)])
    held = {"stories": [write_story(draw)[:80] for _ in range(12)], "sums": [write_sums(draw)[:60] for _ in range(12)]}
    rows = [{"text": text, "source": source} for source, found in held.items() for text in found]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    Path("tuning.yaml").write_text(TUNING, encoding="utf-8")
    write_texts("lambada.jsonl", [f"Anna went from the {place} to the {place}." for place in PLACES])
    return tmp_path


@pytest.fixture
def call(capsys, texts):
    """Return a function that runs the verb; it gives exit status, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["microanneal", *arguments])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


COMMON = ("--recipe", "recipe.yaml", "--from", "nano", "--held-out", "held.jsonl", "--share", "0.5", "--tokens", "2K")


class Stop(TrainerCallback):
    """Stops a run as Ctrl-C does, once a checkpoint is there."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7 and "new" in args.output_dir:
            raise KeyboardInterrupt


def test_a_candidate_that_wins_after_a_stop_and_one_that_loses(call, monkeypatch, set_clock):
    """The stopped command continues to the bits of an undisturbed run; a larger version is benchmarks/microanneal.py."""
    monkeypatch.setattr(training, "draw_losses", lambda run, title: None)  # saves seconds
    monkeypatch.setattr(training, "write_report", lambda run: None)
    build = training.add_journal
    monkeypatch.setattr(
        training,
        "add_journal",
        lambda trainer, run, **given: (build(trainer, run, **given), trainer.add_callback(Stop())),
    )
    assert call("--candidate", "sums.jsonl", *COMMON, "-o", "win")[0] == 130
    monkeypatch.setattr(training, "add_journal", build)
    status, out, err = call("--candidate", "sums.jsonl", *COMMON, "-o", "win", "--json")
    assert status == 0 and "old: finished already" in err and "resuming" in err and "from checkpoint-6" in err
    found = json.loads(out)
    assert found == json.loads(Path("win/microanneal.json").read_text(encoding="utf-8"))
    verdicts = {line["name"]: line["verdict"] for line in found["lines"]}
    assert found["verdict"] == verdicts["in all"] == "better"
    assert verdicts["sums"] == "better"
    lines = {line["name"]: line for line in found["lines"]}
    assert lines["in all"]["rows"] == 24 and lines["sums"]["rows"] == 12
    assert lines["sums"]["test"]["change"] == pytest.approx(lines["sums"]["new"] - lines["sums"]["old"])
    for name, run in zip(("old", "new"), found["runs"], strict=True):
        curve = found["curves"][name]
        assert (run["steps"], run["tokens"]) == (8, 2048)
        assert [line["step"] for line in curve if "z_term" in line and "lm_head_norm" in line] == list(range(1, 9))
    assert not any("cut at" in note for note in found["notes"])
    scores = finetune.evaluate("win/runs/new", "held.jsonl")
    assert lines["in all"]["new"] == pytest.approx(scores.loss, rel=1e-5)
    recipe = load_recipe("win/runs/new/recipe.yaml", ["output=alone"])
    run_training(recipe)
    expected, resumed = (load_file(f"{run}/model/model.safetensors") for run in ("alone", "win/runs/new"))
    assert all((resumed[name] == expected[name]).all() for name in expected)
    old, new = (to_plain(load_recipe(f"win/runs/{arm}/recipe.yaml").recipe) for arm in ("old", "new"))
    assert {key for key in old if old[key] != new[key]} == {"data", "output"}
    assert {key for key in old["data"] if old["data"][key] != new["data"][key]} == {"train"}
    assert Path("win/microanneal.png").stat().st_size > 10_000
    assert "sums.jsonl, 50% of 2,048 tokens: better. held-out loss" in Path("win/report.md").read_text(encoding="utf-8")
    tuned = (
        "--sft",
        "tuning.yaml",
        "--sft-set",
        "model.speed=auto",
        "--tasks",
        "lambada",
        "--task-data",
        "lambada.jsonl",
        "--limit",
        "4",
    )
    finish = anneal_run.finish_compared

    def finish_one(resolved, runs):
        """Let the clock call a way faster for the first run, and slower for the second."""
        set_clock(is_faster=resolved.output.name == "old")
        return finish(resolved, runs)

    monkeypatch.setattr(anneal_run, "finish_compared", finish_one)
    status, out, err = call("--candidate", "noise.jsonl", *COMMON, "-o", "lose", "-s", "model.speed=auto", *tuned)
    assert status == 0 and out.startswith("noise.jsonl, 50% of 2,048 tokens: worse. ")
    found = json.loads(Path("lose/microanneal.json").read_text(encoding="utf-8"))
    said = [note for note in found["notes"] if note.startswith("model.speed")]
    assert said == [
        f"model.speed: all {what} train with bfloat16 products, as the first of them chose"
        for what in ("runs", "fine-tunings")
    ]
    assert [(line["stage"], line["name"], line["rows"]) for line in found["lines"][3:]] == [
        ("annealed", "lambada acc", 4),
        ("annealed", "lambada perplexity (its log-likelihood is tested)", 4),
        ("tuned", "held-out rows of its recipe", 4),
        ("tuned", "lambada acc", 4),
        ("tuned", "lambada perplexity (its log-likelihood is tested)", 4),
    ]
    summary = json.loads(Path("lose/tuned/new/run.json").read_text(encoding="utf-8"))["result"]
    assert found["lines"][5]["new"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    # What the folder holds is of other files.
    status, out, err = call("--candidate", "noise.jsonl", *COMMON, "-o", "win")
    assert (status, out) == (2, "") and "win: holds a micro-annealing of other files" in err


def request(**values):
    given = {
        "candidate": (Path("sums.jsonl"),),
        "share": 0.3,
        "tokens": 2560,
        "start": "nano",
        "output": Path("out"),
        "recipe": Path("recipe.yaml"),
    }
    return AnnealRequest(**{**given, **values})


def read_rows(file):
    return pyarrow.parquet.read_table(file)["input_ids"].to_pylist()


def test_the_tokens_of_every_source_are_in_their_shares(texts):
    """The texts of the old mixture in the run with the candidate are the first of each source in the other run."""
    write_texts("code.jsonl", [f"x = {number}; print(x)" for number in range(200)])
    sources = "data.train=[{path: web.jsonl, weight: 3}, {path: code.jsonl, weight: 1}]"
    rows = prepare_anneal_rows(plan_anneal(request(overrides=(sources, "data.held_out=3"))))
    old, new = (read_rows(rows.find_file(arm)) for arm in ("old", "new"))
    assert (sum(map(len, old)), sum(map(len, new))) == (2560, 2560)
    assert {one.name: one.share for one in rows.accounts} == pytest.approx({"web": 0.75, "code": 0.25, "sums": 0.3})
    texts_of = {name: read_ids(name) for name in ("web", "code", "sums")}

    def count(part, name):
        return sum(len(ids) for ids in part if any(tuple(ids) == text[: len(ids)] for text in texts_of[name]))

    assert [count(old, name) for name in texts_of] == [1920, 640, 0]
    assert [count(new, name) for name in texts_of] == [1344, 448, 768]
    shared = [ids for ids in new if any(tuple(ids) == text[: len(ids)] for text in texts_of["web"])]
    assert shared[:-1] == old[: len(shared) - 1]
    # Three texts of each source are kept apart; those of the candidate do not count.
    assert [(row.source, row.counted) for row in rows.held_out] == [
        *[("web", True)] * 3,
        *[("code", True)] * 3,
        *[("candidate", False)] * 3,
    ]
    trained = {tuple(ids) for ids in chain(old, new)}
    assert not any(tuple(row.token_ids) in trained for row in rows.held_out)


def read_ids(name):
    recipe = load_recipe("recipe.yaml", [f"data.train={name}.jsonl"])
    return {tuple(ids) for ids in prepare_rows(recipe)[1].train["input_ids"]}


def test_held_out_rows_in_the_candidate_are_not_trained(texts):
    held = Path("held.jsonl").read_text(encoding="utf-8")
    Path("leak.jsonl").write_text(held + Path("sums.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    rows = prepare_anneal_rows(plan_anneal(request(candidate=(Path("leak.jsonl"),), held_out=(Path("held.jsonl"),))))
    (leak,) = (one for one in rows.accounts if one.name == "leak")
    assert (leak.left_out, leak.documents) == (24, 60)
    held_ids = {tuple(row.token_ids) for row in rows.held_out}
    assert not held_ids & {tuple(ids) for ids in read_rows(rows.find_file("new"))}
    assert [row.source for row in rows.held_out] == ["stories"] * 12 + ["sums"] * 12


def test_a_text_of_two_sources_is_held_out_of_both(texts):
    """The first source was trained on what was held out of the second, which was drawn later."""
    write_texts("both.jsonl", [f"x = {number}; print(x)" for number in range(200)])
    Path("twin.jsonl").write_bytes(Path("both.jsonl").read_bytes())
    sources = "data.train=[{path: both.jsonl}, {path: twin.jsonl}]"
    rows = prepare_anneal_rows(plan_anneal(request(overrides=(sources, "data.held_out=3"))))
    held = {tuple(row.token_ids) for row in rows.held_out if row.counted}
    assert len(held) > 3  # other texts are drawn of each
    assert not held & {tuple(ids) for ids in read_rows(rows.find_file("old"))}


def test_a_source_that_is_used_up_is_read_again_and_not_without_end(texts):
    write_texts("few.jsonl", [write_sums(random.Random(seed)) for seed in range(5)])
    few = (Path("few.jsonl"),)
    rows = prepare_anneal_rows(plan_anneal(request(candidate=few, held_out=(Path("held.jsonl"),))))
    (one,) = (account for account in rows.accounts if account.name == "few")
    assert one.epochs["new"] == pytest.approx(768 / one.tokens) and one.epochs["new"] > 2
    assert f"read {one.epochs['new']:.2f} times" in one.describe()
    with pytest.raises(DataError, match=r"few: holds [\d,]+ tokens to train on, of which .* Lower --tokens"):
        prepare_anneal_rows(
            plan_anneal(request(candidate=few, held_out=(Path("held.jsonl"),), tokens=80_000, output=Path("o")))
        )
    assert list(Path("o").iterdir()) == []
    # "holds 0 tokens" did not say why.
    with pytest.raises(DataError, match=r"few: nothing is left to train on: each of its rows is also a held-out row"):
        prepare_anneal_rows(plan_anneal(request(candidate=few, held_out=few, output=Path("o"))))


def test_the_standard_error_is_that_of_paired_rows():
    """Against the linearised error of a ratio of means; the rows differ much more from each other than the models do."""
    draw = numpy.random.default_rng(1)
    tokens = draw.integers(5, 60, 400).astype(float)
    old = tokens * draw.uniform(1, 6, 400)
    new = old - tokens * draw.normal(0.02, 0.2, 400)
    line = compare_losses("x", "annealed", RowLosses(old, new, tokens))
    change = (new.sum() - old.sum()) / tokens.sum()
    rest = new - old - change * tokens
    error = (rest**2).sum() ** 0.5 / tokens.sum()
    assert line.test.change == pytest.approx(change)
    assert line.test.stderr == pytest.approx(error, rel=0.03)
    same = compare_losses("x", "annealed", RowLosses(old, old, tokens))
    assert (same.verdict, same.test.p) == ("no real difference", 1.0)
    assert compare_losses("x", "annealed", RowLosses(old, old + tokens, tokens)).verdict == "worse"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "1.5"), "share: must lie between 0 and 1"),
        (("--tokens", "20X"), "must be a number of tokens, such as 20M"),
        (("--tokens", "0"), "must be a number of tokens"),
        (("--candidate", "sum.jsonl"), "sum.jsonl: does not exist"),
        (("--held-out", "no.jsonl"), "no.jsonl: does not exist"),
        (("--from", "nanno"), "did you mean 'nano'"),
        (("--mixture", "phase99"), "phase99"),
        (("--mixture", "phase26"), "data.sources: is missing"),
        (("--mixture", "phase26", "-s", "data.train=web.jsonl"), "--mixture names the old mixture already"),
        (("-s", "schedule.length=7"), "schedule.length: microanneal sets it itself"),
        (("-s", "trainer={max_steps: 3}"), "set its keys one by one"),
        (("-s", "method=sft"), "recipe.yaml: "),
        (("--sft", "recipe.yaml", "--sft-set", "data.eval=[]"), "nothing is measured after --sft"),
        (("--sft-set", "seed=1"), "about the recipe of --sft"),
        (("--recipe", "anneal"), "names no old mixture"),
        (("-s", "data.train=[{path: web.jsonl, rows: 3}]"), "takes no number of rows here"),
        (("-s", "data.train=[{path: web.jsonl, weight: 3}, sums.jsonl]"), "only some files have a weight"),
        (("-s", "optimizer.states=published"), "no optimizer state"),
        (("-s", "data.max_tokens=5000"), "positions"),
        (("--tasks", "lambda"), "did you mean 'lambada'"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(call, arguments, message):
    status, out, err = call("--candidate", "sums.jsonl", *COMMON, "-o", "out", *arguments)
    assert (status, out, "Traceback" in err) == (2, "", False)
    assert message in err
    assert not Path("out").exists()


def test_wrong_types_from_python(texts):
    common = {"output": "out", "start": "nano", "tokens": 100, "recipe": "recipe.yaml"}
    for values, named in (
        ({"share": "0.3"}, "share: must be a number"),
        ({"tokens": 1.5}, "tokens"),
        ({"tasks": ["lambada"], "task_options": {"limits": 3}}, "did you mean 'limit'"),
        ({"held_out": [3]}, "held_out"),
    ):
        with pytest.raises(ArgumentError, match=named):
            finetune.microanneal("sums.jsonl", **{**common, **values})
    with pytest.raises(FinetuneError, match="no data file is named"):
        finetune.microanneal([], **common)
