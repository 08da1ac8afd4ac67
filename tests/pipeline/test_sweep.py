"""`finetune sweep`: which runs it makes, the table against direct training, kills, runs that fail, mistakes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune.cli.main import main
from finetune.errors import RecipeError, TrainingError
from finetune.pipeline.same_speed import describe_choices, join_choices
from finetune.pipeline.sweeping import sweep_run
from finetune.pipeline.sweeping.sweep_grid import plan_sweep, split_values
from finetune.pipeline.sweeping.sweep_report import Outcome, SweepReport
from finetune.recipe.sections import dump_recipe
from finetune.training import run as training
from finetune.training.run import run_training
from finetune.training.training_rows import prepare_rows

RATE = "trainer.learning_rate"
SMALL = ("trainer.per_device_train_batch_size=2", "data.eval=few.jsonl")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4", ["1e-4"]),
        ("1e-4,2e-4, 5e-4", ["1e-4", "2e-4", " 5e-4"]),
        ("[q_proj,v_proj]", ["[q_proj,v_proj]"]),
        ("[q_proj,v_proj],[all-linear]", ["[q_proj,v_proj]", "[all-linear]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'Be short, please.'", ["'Be short, please.'"]),
        ('"one, two",three', ['"one, two"', "three"]),
        (r'"a\", b",c', [r'"a\", b"', "c"]),
        ("'it''s, so',x", ["'it''s, so'", "x"]),
        ("[don't,'a]b'],x", ["[don't,'a]b']", "x"]),
        ("don't,do", ["don't", "do"]),
        ("a[1,2]", ["a[1", "2]"]),  # only a value that begins with a bracket is a list, as for `finetune train`
        ("a,,b", ["a", "", "b"]),
        ("", [""]),
    ],
)
def test_commas_separate_values_outside_lists_and_quotes(text, values):
    assert split_values(text) == values


def plan(make_recipe, tmp_path, *overrides, seeds=1):
    make_recipe("unused")  # writes the recipe and its rows
    return plan_sweep(tmp_path / "recipe.yaml", overrides, seeds, tmp_path / "out").runs


def test_every_combination_is_trained_with_every_seed_on_the_same_rows(make_recipe, tmp_path):
    overrides = (f"{RATE}=1e-3,2e-3", "adapter.targets=[q_proj,v_proj],[all-linear]", "adapter.rank=8", "seed=7")
    runs = plan(make_recipe, tmp_path, *overrides, seeds=2)
    settings = [
        (recipe.trainer["learning_rate"], recipe.adapter.targets, recipe.seed)
        for recipe in (run.resolved.recipe for run in runs)
    ]
    lists = (("q_proj", "v_proj"), ("all-linear",))
    assert settings == [(rate, targets, seed) for rate in (1e-3, 2e-3) for targets in lists for seed in (7, 8)]
    assert {(run.resolved.recipe.adapter.rank, run.resolved.recipe.data.seed) for run in runs} == {(8, 7)}
    assert len({run.resolved.recipe.output for run in runs}) == 8
    assert runs[0].setting == "learning_rate=1e-3, targets=[q_proj,v_proj]"
    # Folders keep their names when values are added, so that nothing is trained again.
    more = plan(make_recipe, tmp_path, f"{RATE}=5e-3,1e-3,2e-3", *overrides[1:], seeds=3)
    assert {run.resolved.output for run in runs} < {run.resolved.output for run in more}
    # So they do when values are taken away, also where one is left: such a run was trained again under another name.
    one = plan(make_recipe, tmp_path, f"{RATE}=2e-3", *overrides[1:], seeds=2)
    assert {run.resolved.output for run in one} < {run.resolved.output for run in runs}
    assert {run.setting for run in one} == {"targets=[q_proj,v_proj]", "targets=[all-linear]"}


def test_long_values_that_begin_alike_are_two_settings(make_recipe, tmp_path):
    """Both were cut to one name, and their seeds were averaged as those of one setting."""
    lists = [
        "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj]",
        "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    ]
    runs = plan(make_recipe, tmp_path, f"adapter.targets={','.join(lists)}")
    assert [run.setting for run in runs] == [f"targets={value}" for value in lists]
    runs = plan(make_recipe, tmp_path, f"adapter.targets=[q_proj],{lists[1]}")
    assert [run.setting for run in runs] == ["targets=[q_proj]", "targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,…"]


def test_the_held_out_rows_of_all_seeds_are_those_of_the_first(make_recipe, tmp_path):
    runs = plan(make_recipe, tmp_path, "data.eval=[]", "data.held_out=4", seeds=2)
    held = [prepare_rows(run.resolved)[1].evaluation["origin"] for run in runs]
    first = prepare_rows(make_recipe("one", "data.eval=[]", "data.held_out=4"))[1].evaluation["origin"]
    assert list(held[0]) == list(held[1]) == list(first)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{RATE}=1e-3,0.001"], "learning_rate=1e-3 and learning_rate=0.001 are the same recipe"),
        ([f"{RATE}=1e-3,,2e-3"], "a value between two commas is empty"),
        ([f"{RATE}=1e-3,2e-3", f"{RATE}=5e-3"], "is given twice"),
        ([f"{RATE}=1e-3", f"{RATE}=5e-3"], f"is given twice; write all its values in one: {RATE}=1e-3,5e-3"),
        (["seed=1,2"], "--seeds says how many"),
        (["output=elsewhere"], "below that of -o; leave it out"),
        (["data.eval=[]"], "a sweep compares held-out losses"),
        ([f"{RATE}=1e-3,fast"], "recipe.yaml with learning_rate=fast: 1 problem"),
        (["adapter.rnk=8,16"], "did you mean 'rank'"),
        ([RATE], "must read section.key=value"),
        (["data.system=Hello, you,Hello, you"], "same recipe"),
        (["adapter.targets=[q_proj,v_proj,[k_proj]"], "--set adapter.targets=[q_proj,v_proj,[k_proj]: line 1"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_trained(make_recipe, tmp_path, overrides, message):
    with pytest.raises(RecipeError) as refused:
        plan(make_recipe, tmp_path, *overrides)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, make_recipe):
    """Return a function that runs the verb in `tmp_path`; it gives exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    make_recipe("unused")
    lines = Path("held.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[:2]), encoding="utf-8")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["sweep", "recipe.yaml", *arguments])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


class Stop(TrainerCallback):
    """Stops a run as Ctrl-C does, after its second step and checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_stopped_sweep_continues_to_the_same_table_and_a_failed_run_is_named(
    call, make_recipe, tmp_path, monkeypatch
):
    """The finite rate equals a run of `finetune train`; the other one makes every weight NaN."""
    saving = ("trainer.save_strategy=steps", "trainer.save_steps=2", *SMALL)
    arguments = ("-s", f"{RATE}=2e-3,1e30", *(part for text in saving for part in ("-s", text)), "-o", "out")
    monkeypatch.setattr(training, "draw_losses", lambda run, title: None)  # saves seconds
    monkeypatch.setattr(training, "write_report", lambda run: None)
    build = training.add_journal
    monkeypatch.setattr(
        training,
        "add_journal",
        lambda trainer, run, **given: (build(trainer, run, **given), trainer.add_callback(Stop())),
    )
    assert call(*arguments)[0] == 130
    monkeypatch.setattr(training, "add_journal", build)
    (run,) = Path("out/runs").glob("learning_rate=2e-3-*-seed42")
    assert (run / "checkpoint-2").is_dir() and not (run / "adapter").exists()
    status, out, err = call(*arguments, "--json")
    assert status == 2 and "Traceback" not in err and f"resuming {run.resolve()} from checkpoint-2" in err
    found = json.loads(out)
    assert found == json.loads(Path("out/sweep.json").read_text(encoding="utf-8"))
    alone = run_training(make_recipe("alone", f"{RATE}=2e-3", "data.seed=42", *saving))
    good, bad = found["runs"]
    assert (good["final"], good["best"], good["steps"]) == (alone.eval_loss, alone.eval_loss, 4)
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "alone" / "adapter" / "adapter_model.safetensors")
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert bad["final"] is None and "loss" in bad["failed"]
    assert found["settings"][1]["failed"] == 1
    assert "failed: learning_rate=1e30, seed 42: " in Path("out/report.md").read_text(encoding="utf-8")
    assert Path("out/sweep.png").stat().st_size > 10_000

    # Once more: what has finished is not trained again, and what failed is.
    def refuse(*arguments):
        raise TrainingError("no trainer was expected")

    monkeypatch.setattr(training, "build_trainer", refuse)
    status, out, err = call(*arguments, "--json")
    again = json.loads(out)
    assert (status, err.count("finished already")) == (2, 1)
    assert again["runs"][0] == good and again["runs"][1]["failed"] == "no trainer was expected"


PRODUCTS = "bfloat16 products"


def read_ways(folder):
    found = {}
    for file in sorted(Path(folder).glob("runs/*/run.json")):
        found[file.parent.name.rpartition("-")[2]] = json.loads(file.read_text(encoding="utf-8"))["speed"]
    return found


@pytest.mark.parametrize("is_faster", [True, False])
def test_the_first_run_decides_how_all_train(call, set_clock, monkeypatch, is_faster):
    """Each run asked the clock, so that two that are compared could differ by rounding because the machine was busy."""
    monkeypatch.setattr(training, "draw_losses", lambda run, title: None)  # saves seconds
    monkeypatch.setattr(training, "write_report", lambda run: None)
    monkeypatch.setattr(sweep_run, "draw_sweep", lambda report, folder: None)
    arguments = ("-s", "model.speed=auto", *(part for text in SMALL for part in ("-s", text)))
    arguments = (*arguments, "-s", "trainer.max_steps=1", "--json", "-o", "out")
    set_clock(is_faster=is_faster)
    status, out, _ = call(*arguments)
    chosen = [PRODUCTS] if is_faster else []
    assert (status, read_ways("out")["seed42"]["ways"]) == (0, chosen)
    set_clock(is_faster=not is_faster)
    status, out, _ = call(*arguments, "--seeds", "2")
    assert (status, read_ways("out")["seed43"]["ways"]) == (0, chosen)
    said = f"with {PRODUCTS}" if is_faster else "as without it"
    assert json.loads(out)["notes"] == [f"model.speed: all runs train {said}, as the first of them chose"]
    if is_faster:
        assert "loss" in read_ways("out")["seed43"]["reason"]  # it is compared again, by its figures alone
    else:
        assert (
            "bfloat16 products: the runs that this one is compared with do without"
            in read_ways("out")["seed43"]["reason"]
        )


def test_runs_that_cannot_train_alike_are_named(tmp_path):
    """A run whose settings do not allow a way does without; losses that rounding may part are not compared unsaid."""
    runs = {}
    for name, speed in (("a", {"ways": [PRODUCTS], "reason": "r"}), ("b", {"ways": [], "reason": "r"}), ("c", None)):
        (tmp_path / name).mkdir()
        record = {} if speed is None else {"speed": speed}
        (tmp_path / name / "run.json").write_text(json.dumps(record), encoding="utf-8")
        runs[name] = tmp_path / name
    assert join_choices(runs.values()) == {PRODUCTS}
    assert join_choices([runs["b"]]) == frozenset() and join_choices([runs["c"]]) is None
    (said,) = describe_choices(runs)
    assert said.endswith(f"may differ by rounding. With {PRODUCTS}: a. As without it: b; c")
    assert describe_choices({"c": runs["c"]}) == ()


def test_a_damaged_choice_is_one_message_before_anything_is_trained(call):
    (run,) = plan_sweep(Path("recipe.yaml"), ("model.speed=auto",), 1, Path("out")).runs
    run.resolved.output.mkdir(parents=True)
    (run.resolved.output / "recipe.yaml").write_text(dump_recipe(run.resolved.recipe), encoding="utf-8")
    (run.resolved.output / "run.json").write_text(json.dumps({"status": "running", "speed": "fast"}), encoding="utf-8")
    status, out, err = call("-s", "model.speed=auto", "-o", "out")
    assert (status, out) == (2, "")
    assert "run.json: speed: must be an object" in err and "choose another folder with -o" in err


def test_runs_of_another_recipe_are_refused(call):
    (run,) = plan_sweep(Path("recipe.yaml"), (), 1, Path("out")).runs
    run.resolved.output.mkdir(parents=True)
    other = dump_recipe(replace(run.resolved.recipe, answers=9))
    (run.resolved.output / "recipe.yaml").write_text(other, encoding="utf-8")
    status, out, err = call("-o", "out")
    assert (status, out) == (2, "")
    assert "- answers: 9" in err and "choose another folder with -o" in err


def test_a_foreign_folder_is_left_alone(call):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    status, out, err = call("-o", "mine")
    assert (status, out) == (2, "") and "exists and holds no sweep" in err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def make_outcome(setting, seed, final, **values):
    return Outcome(setting, {"a": setting}, seed, "run", final=final, best=final, seconds=2.0, **values)


def test_means_spreads_and_paired_differences():
    outcomes = [make_outcome("x", seed, value) for seed, value in enumerate((1.0, 1.2, 1.4))]
    outcomes += [make_outcome("y", seed, value) for seed, value in enumerate((1.1, 1.31, 1.49))]
    outcomes += [make_outcome("z", 0, 0.5), Outcome("z", {"a": "z"}, 1, "run", failed="NaN"), make_outcome("z", 2, 0.5)]
    report = SweepReport("r", "o", tuple(outcomes), (), 9)
    x, y, z = report.list_settings()
    assert (x.final.mean, x.final.spread) == (pytest.approx(1.2), pytest.approx(0.2))
    # Differences 0.10, 0.11, 0.09: mean 0.1, standard error 0.01 / sqrt(3).
    assert x.against_best is None  # z has lower losses, but one of its runs failed
    assert (y.against_best.change, y.against_best.stderr) == (pytest.approx(0.1), pytest.approx(0.01 / math.sqrt(3)))
    assert y.against_best.p == pytest.approx(0.0033, abs=1e-4)  # t = 17.32 with two degrees of freedom
    assert (z.finished, z.failed, z.against_best.change) == (2, 1, pytest.approx(-0.7))
    assert report.verdict.startswith("best is x: held-out loss 1.2000 ± 0.2000 over 3 seeds. Really worse: y")


def test_a_setting_without_a_seed_in_common_is_not_called_best():
    """It has no difference from the best one, as the best one itself."""
    outcomes = [Outcome("x", {}, 0, "run", failed="NaN"), make_outcome("x", 1, 2.0)]
    outcomes += [make_outcome("y", 0, 1.0), Outcome("y", {}, 1, "run", failed="NaN")]
    assert SweepReport("r", "o", tuple(outcomes), (), 4).verdict.startswith("best is y")


def test_nothing_is_called_best_where_the_held_out_rows_differ():
    report = SweepReport("r", "o", (make_outcome("x", 0, 1.0), make_outcome("y", 0, 2.0)), ("they differ",), 2)
    assert report.verdict == "none is called best, since their held-out rows differ"
    assert "note: they differ" in report.describe()


def test_finished_runs_of_other_values_are_named_and_change_no_verdict(call, make_recipe, tmp_path, monkeypatch):
    """They were left out of the new table without a word."""
    for name, status in (("rate=9-1-seed42", "finished"), ("rate=8-1-seed42", "failed")):
        folder = tmp_path / "out" / "runs" / name / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder.parent / "run.json").write_text(json.dumps({"status": status, "result": {}}))
    monkeypatch.setattr(sweep_run, "_compare_rows", lambda runs: ())
    monkeypatch.setattr(
        sweep_run, "_train", lambda run: (Outcome(run.setting, run.values, run.seed, "r", final=1.0, best=1.0), False)
    )
    note = "1 finished run in this folder is not in the table: rate=9-1-seed42"
    status, out, _ = call("-o", "out")
    assert status == 0 and f"note: {note}" in out and "as the recipe says: held-out loss 1.0000" in out
    assert note in Path("out/report.md").read_text(encoding="utf-8")
    assert json.loads(Path("out/sweep.json").read_text(encoding="utf-8"))["notes"] == [note]


def test_one_seed_gives_no_verdict_about_chance():
    report = SweepReport("r", "o", (make_outcome("x", 0, 1.0), make_outcome("y", 0, 2.0)), (), 2)
    assert "best is x" in report.verdict and "--seeds 3" in report.verdict
    assert report.describe().splitlines()[2].split() == ["y", "1", "2.0000", "2.0000", "+1.0000", "2"]


def test_a_reward_is_better_where_it_is_higher():
    outcomes = [
        make_outcome(name, seed, value + seed, measure="held-out reward")
        for name, value in (("x", 1.0), ("y", 2.0))
        for seed in (0, 1)
    ]
    assert SweepReport("r", "o", tuple(outcomes), (), 4).verdict.startswith("best is y")


def test_a_typing_error_makes_no_recipes_without_end(make_recipe, tmp_path):
    """`--seeds 99999999999` filled the memory for minutes without a word."""
    with pytest.raises(RecipeError, match=r"make 20,000,000,000 runs; a sweep takes at most 1,000"):
        plan(make_recipe, tmp_path, f"{RATE}=1e-3,2e-3", seeds=10**10)


def test_long_chinese_values_are_names_of_folders(make_recipe, tmp_path):
    """A name of 80 Chinese letters has 240 bytes; with rarer ones or a long seed it was longer than file systems take."""
    values = [f"'{letter * 100}'" for letter in ("学", "\U00020000")]
    runs = plan(make_recipe, tmp_path, f"data.system={values[0]},{values[1]}", "adapter.rank=4", "seed=123456789")
    names = [run.resolved.output.name for run in runs]
    assert len(set(names)) == 2 and all(len(name.encode()) <= 80 + len("-123456-seed123456789") for name in names)
