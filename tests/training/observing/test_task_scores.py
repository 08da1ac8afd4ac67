"""Tasks that a run is evaluated on while it trains: their scores are right, and the run is the same as without them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from finetune.api import evaluate_tasks
from finetune.errors import RecipeError
from finetune.runs.run_files import read_metrics
from finetune.training.observing.task_scores import _is_due, plan_tasks
from finetune.training.run import run_training

STEPS = ("trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.logging_steps=1", "adapter.dropout=0.2")
TEXTS = [f"The {word} is here, and nobody sees the {word}" for word in ("river", "stone", "window", "horse")]
SUMS = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 7)]


@pytest.fixture
def tasks(tmp_path):
    """Write the rows of two tasks; return the override that names both."""
    write = lambda name, rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("passages.jsonl", [{"text": text} for text in TEXTS])
    write("sums.jsonl", SUMS)
    return "data.tasks=[{name: lambada, path: passages.jsonl, every: 0.5}, {name: gsm8k, path: sums.jsonl, exemplars: sums.jsonl, limit: 1}]"


def read_weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def drop_times(lines):
    return [
        {name: value for name, value in line.items() if "runtime" not in name and "per_second" not in name}
        for line in lines
    ]


def test_scores_are_logged_and_the_run_is_the_same(train, tasks, tmp_path):
    plain, asked = train("plain", *STEPS), train("asked", *STEPS, tasks)
    first, second = read_weights(plain), read_weights(asked)
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = drop_times(read_metrics(asked))
    scores = [line for line in lines if any(name.startswith("eval_task/") for name in line)]
    assert [line for line in lines if line not in scores] == drop_times(read_metrics(plain))
    assert [line["step"] for line in scores] == [2, 4]
    assert "eval_task/gsm8k/flexible" not in scores[0]
    found = evaluate_tasks(str(asked), ["lambada"], data=tmp_path / "passages.jsonl", output=tmp_path / "out")
    assert scores[1]["eval_task/lambada/perplexity"] == pytest.approx(
        found.tasks["lambada"].metric["perplexity"], rel=1e-5
    )
    assert scores[1]["eval_task/gsm8k/bits_per_byte"] > 0
    assert "task lambada: perplexity" in (asked / "report.html").read_text(encoding="utf-8")
    for path in (asked / "adapter", asked / "checkpoint-4"):
        shutil.rmtree(path)
    train("asked", *STEPS, tasks, resume=True)
    assert drop_times(read_metrics(asked)) == lines
    third = read_weights(asked)
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_the_best_checkpoint_may_be_chosen_by_a_task(train, make_recipe, tasks):
    name = "task/lambada/perplexity"
    best = [
        *STEPS,
        "data.tasks=[{name: lambada, path: passages.jsonl}]",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
    ]
    best += [
        "trainer.load_best_model_at_end=true",
        f"trainer.metric_for_best_model={name}",
        "trainer.greater_is_better=false",
    ]
    run = train("best", *best)
    found = {line["step"]: line[f"eval_{name}"] for line in read_metrics(run) if f"eval_{name}" in line}
    assert list(found) == [2, 4]
    assert all("eval_loss" in line for line in read_metrics(run) if f"eval_{name}" in line)
    step = min(found, key=found.get)
    kept, expected = read_weights(run), load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    problems = {
        "trainer.greater_is_better=true": "less is better of task/lambada/perplexity; set this key to false",
        "trainer.metric_for_best_model=eval_task/lambada/ppl": "'task/lambada/ppl' is unknown; did you mean",
        "data.tasks=[{name: lambada, path: passages.jsonl, every: 1}]": "is evaluated at each evaluation; remove this key",
    }
    for override, problem in problems.items():
        with pytest.raises(RecipeError, match=problem):
            run_training(make_recipe("refused", *best, override))
    assert not (run.parent / "refused").exists()


@pytest.mark.parametrize(
    ("every", "steps"),
    [(None, [7]), (1.0, [7]), (0.5, [4, 7]), (0.25, [2, 4, 6, 7]), (0.3, [3, 5, 7]), (0.01, [1, 2, 3, 4, 5, 6, 7])],
)
def test_a_share_of_the_run_ends_at_a_step(every, steps):
    states = [SimpleNamespace(global_step=step, max_steps=7) for step in range(1, 8)]
    assert [state.global_step for state in states if _is_due(every, state)] == steps


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[{name: gsm8}]", r"data.tasks\[1\].name: 'gsm8' is an unknown task; did you mean 'gsm8k'\?"),
        ("[lambada, lambada]", r"data.tasks\[2\].name: lambada is named twice"),
        ("[{name: lambada, limit: 0}]", r"data.tasks\[1\].limit: must be at least 1"),
        ("[{name: lambada, every: 2}]", r"data.tasks\[1\].every: must be a share of the run's steps above 0, at most 1; found 2"),
        ("[{name: lambada, path: pasages.jsonl}]", r"data.tasks\[1\].path: pasages.jsonl does not exist; .*passages.jsonl does"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_when_the_recipe_is_checked(make_recipe, tasks, value, problem):
    with pytest.raises(RecipeError, match=problem):
        make_recipe("refused", f"data.tasks={value}")


def test_sharded_weights_cannot_be_asked(make_recipe, tasks, monkeypatch):
    monkeypatch.setattr("finetune.training.observing.task_scores.find_engine", lambda: "fsdp2")
    with pytest.raises(RecipeError, match="shards the weights, and one process cannot ask the model alone"):
        plan_tasks(make_recipe("refused", tasks).recipe.data.tasks, {})
