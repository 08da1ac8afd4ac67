"""Preference runs as a whole: resumed they are the same run, what is computed of the start is kept, bad rows are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from trl import DPOTrainer, KTOTrainer

from finetune.check.recipes import load_recipe
from finetune.cli.main import main
from finetune.rewards.rules import RULES, Rule
from finetune.training.run import run_training

SAVING = ["trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2"]


@pytest.fixture
def go_on(chain, tmp_path):
    """Return a function that goes on from the earlier run of a recipe of the chain; its run lies in `tmp_path/<name>`."""

    def run(name, recipe, *overrides, resume=False):
        overrides = [f"output={tmp_path / name}", "answers=0", *overrides]
        run_training(load_recipe(chain / f"{recipe}.yaml", overrides), resume)
        return tmp_path / name

    return run


def cut_off(run):
    """Leave a run as if it had been killed between its checkpoints."""
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(run / name)


def check_same_adapter(one, other):
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert not [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])]


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_resuming_with_a_frozen_adapter_is_bit_for_bit_the_same_run(go_on, recipe):
    straight, resumed = go_on("straight", recipe, *SAVING), go_on("resumed", recipe, *SAVING)
    assert (resumed / "checkpoint-2" / "ref").is_dir()  # the reference is a frozen copy, not the base
    cut_off(resumed)
    go_on("resumed", recipe, *SAVING, resume=True)
    check_same_adapter(straight, resumed)
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [1, 2, 3, 4]


@pytest.mark.parametrize(("method", "trainer_class"), [("dpo", DPOTrainer), ("kto", KTOTrainer)])
def test_what_is_computed_of_the_start_is_kept(
    make_pairs_recipe, tmp_path, monkeypatch, read_losses, method, trainer_class
):
    """A second run and a resumed one read the reference's log-probabilities from the cache, and are the same run."""
    passes, compute = [], trainer_class.compute_ref_log_probs
    monkeypatch.setattr(trainer_class, "compute_ref_log_probs", lambda *given: passes.append(1) or compute(*given))
    overrides = [*SAVING, "trainer.precompute_ref_log_probs=true", "trainer.eval_strategy=epoch"]
    for name in ("first", "second"):
        run_training(make_pairs_recipe(name, method, *overrides))
        if name == "first":
            assert passes
            passes.clear()
    cut_off(tmp_path / "second")
    run_training(make_pairs_recipe("second", method, *overrides), resume=True)
    assert not passes
    check_same_adapter(tmp_path / "first", tmp_path / "second")
    run_training(make_pairs_recipe("live", method, *overrides, "trainer.precompute_ref_log_probs=false"))
    assert read_losses(tmp_path / "first") == pytest.approx(read_losses(tmp_path / "live"), abs=1e-5)


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
TURN = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("method", "row", "message"),
    [
        ("dpo", {**PAIR, "rejected": "A"}, "chosen and rejected are the same, so the pair prefers neither"),
        ("dpo", {"prompt": "Q", "chosen": "A"}, "has no 'rejected'"),
        ("dpo", {**PAIR, "rejected": ""}, "rejected"),
        (
            "dpo",
            {
                "chosen": [TURN, {"role": "assistant", "content": "A"}],
                "rejected": [{**TURN, "content": "P"}, {"role": "assistant", "content": "B"}],
            },
            "chosen and rejected answer different prompts (they differ from a user message on)",
        ),
        ("kto", {"prompt": "Q", "completion": "A", "label": "yes"}, "label is"),
        ("kto", {"prompt": "Q", "completion": "A", "label": 2}, "label is"),
        ("reward", {**PAIR, "rejected": "A"}, "chosen and rejected are the same"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(make_pairs_recipe, tmp_path, capsys, method, row, message):
    good = PAIR if "completion" not in row else {"prompt": "Q", "completion": "A", "label": True}
    rows = [good, {**good, "prompt": "Q2"}, row]
    if "completion" in row:
        rows[1]["label"] = False
    make_pairs_recipe("unused", method)  # writes the recipe
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    settings = [f"method={method}", "data.train=pairs.jsonl", "data.eval=[]", f"output={tmp_path / 'run'}"]
    told = call_train(capsys, tmp_path / "recipe.yaml", *settings)
    assert f"{file}, line 3: " in told
    assert message in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda answer: 1 / 0, "failed on an answer to this row (ZeroDivisionError"),
        (lambda answer: float("nan"), "gave nan"),
    ],
)
def test_a_bad_reward_function_names_the_row(make_pairs_recipe, tmp_path, capsys, monkeypatch, rule, message):
    make_pairs_recipe("unused", "dpo")  # writes the recipe
    monkeypatch.setitem(RULES, "broken", Rule("broken", rule, "for this test"))
    sizes = ["trainer.num_generations=4", "trainer.max_completion_length=2", "trainer.per_device_train_batch_size=4"]
    settings = ["method=grpo", "rewards.rules={broken: 1}", "data.eval=[]", f"output={tmp_path / 'run'}", *sizes]
    told = call_train(capsys, tmp_path / "recipe.yaml", *settings)
    assert f"the reward broken {message}" in told
    assert f"{tmp_path / 'rows.jsonl'}, line " in told
    assert not (tmp_path / "run").exists()


def call_train(capsys, recipe, *settings):
    """Run `finetune train`, which must end with exit status 2 and one message."""
    with pytest.raises(SystemExit) as ended:
        main(["train", str(recipe), *(part for setting in settings for part in ("-s", setting))])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told
