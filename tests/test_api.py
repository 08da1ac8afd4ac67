"""The door for `import finetune`: light, complete, and the same as the command line."""

import inspect
import json
import subprocess
import sys
from dataclasses import asdict

import pytest

import finetune
from finetune.cli.main import main
from finetune.errors import FinetuneError, RecipeError
from finetune.files.resources import find_demo_data

FUNCTIONS = ["evaluate", "export", "fold", "load_recipe", "open_model", "plan", "preview", "train"]


def test_importing_loads_nothing_of_size():
    code = (
        "import sys; before = set(sys.modules); import finetune\n"
        "print([name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['finetune']"


def test_every_function_is_there_documented_and_typed():
    # Rooms must not bear the name of a function: importing one would put it in the function's place.
    assert dir(finetune) == finetune.__all__ == FUNCTIONS
    for name in FUNCTIONS:
        function = getattr(finetune, name)
        assert inspect.isfunction(function) and function.__doc__
        signature = inspect.signature(function)
        hints = [*(parameter.annotation for parameter in signature.parameters.values()), signature.return_annotation]
        assert inspect.Signature.empty not in hints
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        finetune.trian  # noqa: B018


def test_a_run_from_recipe_to_answer(tmp_path, nano_llama, capsys):
    rows = find_demo_data("demo_eval.jsonl")
    settings = [
        f"output={tmp_path / 'run'}",
        f"data.train={rows}",
        "data.eval=[]",
        "trainer.max_steps=2",
        "trainer.num_train_epochs=1",
        "answers=0",
        "trainer.disable_tqdm=true",
    ]
    recipe = finetune.load_recipe("demo", settings)
    assert finetune.preview(recipe, 1).rows[0].token_ids
    assert finetune.plan(recipe, memory="8GB").fits
    summary = finetune.train(recipe)
    assert summary.steps == 2
    report = finetune.export(summary.run, tmp_path / "export", dtype="float32", verify=False)
    scores = finetune.evaluate(tmp_path / "export", rows, max_tokens=256)
    reply = finetune.open_model(tmp_path / "export").answer("Hello!", 4)
    folded = finetune.fold("nano", tmp_path / "fold", dtype="float32")
    assert (report.dtype, folded.dtype, reply.tokens) == ("float32", "float32", 4)
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "export"), "--data", str(rows), "--max-tokens", "256", "--json"])
    assert json.loads(capsys.readouterr().out) == asdict(scores)


def test_a_chain_is_for_the_command_line(tmp_path):
    with pytest.raises(
        RecipeError,
        match="stages: this recipe is a chain, but a recipe of one run is needed here; run the chain with `finetune train`",
    ):
        finetune.load_recipe("instruct")


def test_checking_a_recipe_loads_no_torch():
    code = "import sys, finetune; finetune.load_recipe('sft_qlora'); print({'torch', 'trl', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and not done.stderr


def test_choices_that_do_not_exist_are_refused(tmp_path):
    """They were raw errors of Python's, some of them after the weights had been read."""
    with pytest.raises(FinetuneError, match="dtype: 'int3' is unknown; known are auto, bfloat16, float16, float32"):
        finetune.export(tmp_path, tmp_path / "out", dtype="int3")
    with pytest.raises(FinetuneError, match="base: 'ful' is unknown; did you mean 'full'"):
        finetune.export(tmp_path, tmp_path / "out", base="ful")
    with pytest.raises(FinetuneError, match="dtype: 'int3' is unknown"):
        finetune.fold("nano", tmp_path / "out", dtype="int3")
    with pytest.raises(FinetuneError, match="no data file is named"):
        finetune.evaluate("nano", [])
    assert finetune.load_recipe("demo", "seed=7").recipe.seed == 7  # one override need not be a list
    assert not list(tmp_path.iterdir())
