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

FUNCTIONS = [
    "dynamics",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fold",
    "load_recipe",
    "microanneal",
    "open_model",
    "plan",
    "preview",
    "sweep",
    "train",
]


def test_importing_loads_nothing_of_size():
    code = (
        "import sys; before = set(sys.modules); import finetune\n"
        "new = [name for name in set(sys.modules) - before if sys.modules[name] is not None]\n"  # None bars a package from being loaded
        "print([name for name in new if name.split('.')[0] not in sys.stdlib_module_names])"
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finetune.load_recipe(None), "recipe: must be the path or the name of a recipe .*; found None"),
        (lambda: finetune.load_recipe(""), "recipe: must be the path or the name of a recipe .*; found ''"),
        (lambda: finetune.load_recipe(b"demo"), "recipe: must be .*; found b'demo'"),
        (lambda: finetune.load_recipe("demo", {"output": "x"}), "load_recipe: overrides: must be a text .*; found {"),
        (lambda: finetune.load_recipe("demo", [3]), r"load_recipe: overrides: must be a text .*; found \[3\]"),
        (lambda: finetune.train(3), "train: recipe: must be .* or what load_recipe returned; found 3"),
        (lambda: finetune.train("demo", resume="yes"), "train: resume: must be True or False; found 'yes'"),
        (lambda: finetune.train("demo", force=1), "train: force: must be True or False; found 1"),
        (lambda: finetune.preview({"method": "sft"}), "preview: recipe: must be .*; found {'method': 'sft'}"),
        (lambda: finetune.preview("demo", -1), "preview: rows: must be a whole number of 1 or more; found -1"),
        (lambda: finetune.preview("demo", True), "preview: rows: must be a whole number of 1 or more; found True"),
        (lambda: finetune.plan("demo", memory=8), "plan: memory: must be a text such as '8GB'; found 8"),
        (lambda: finetune.plan("demo", memory="much"), "plan: memory: 'much' is not a memory size; write one such as"),
        (lambda: finetune.plan("demo", gpu=4090), "plan: gpu: must be a text such as 'RTX 4090'; found 4090"),
        (lambda: finetune.evaluate(None, "rows.jsonl"), "evaluate: model: must be a run directory, .*; found None"),
        (lambda: finetune.evaluate("nano", 7), "evaluate: data: must be a data file .*, or a list of files; found 7"),
        (lambda: finetune.evaluate("nano", [7]), "evaluate: data: must be a list of data files .*; found 7"),
        (lambda: finetune.evaluate("nano", []), "evaluate: no data file is named"),
        (
            lambda: finetune.evaluate("nano", "rows.jsonl", max_tokens="x"),
            "evaluate: max_tokens: must be a whole number of 1 or more; found 'x'",
        ),
        (
            lambda: finetune.evaluate_tasks("nano", "lambada"),
            r"evaluate_tasks: tasks: must be a list of tasks; found 'lambada'; write \['lambada'\]",
        ),
        (
            lambda: finetune.evaluate_tasks("nano", ["lambada"], protocol="mine"),
            "evaluate_tasks: protocol: must be one of harness, authors; found 'mine'",
        ),
        (
            lambda: finetune.evaluate_tasks("nano", ["lambada"], limit=0),
            "evaluate_tasks: limit: must be a whole number of 1 or more; found 0",
        ),
        (lambda: finetune.dynamics("nano", "out"), "dynamics: checkpoints: must be a list of names; found 'nano'"),
        (lambda: finetune.dynamics([3], "out"), "dynamics: checkpoints: must be a run directory, .*; found 3"),
        (lambda: finetune.dynamics([], "out"), "dynamics: names no checkpoint; give some"),
        (lambda: finetune.dynamics(["nano"], None), "dynamics: output: must be a path .*; found None"),
        (lambda: finetune.dynamics(["nano"], "out", keep="some"), "dynamics: keep: must be one of all, none; found"),
        (
            lambda: finetune.dynamics(["nano"], "out", texts=[1]),
            "dynamics: texts: must be a list of data files .*; found 1",
        ),
        (lambda: finetune.export(5, None), "export: run: must be a path .*; found 5"),
        (lambda: finetune.export("run", None), "export: output: must be a path .*; found None"),
        (lambda: finetune.export("run", "out", dtype="float8"), "export: dtype: 'float8' is unknown"),
        (lambda: finetune.export("run", "out", dtype=["float32"]), "export: dtype: .* is unknown"),
        (lambda: finetune.export("run", "out", base=None), "export: base: None is unknown"),
        (lambda: finetune.export("run", "out", verify="no"), "export: verify: must be True or False; found 'no'"),
        (
            lambda: finetune.export("run", "out", base_model=1),
            "export: base_model: must be a run directory, .*; found 1",
        ),
        (lambda: finetune.export("run", "out", max_shard_size=2), "export: max_shard_size: must be a text .*; found 2"),
        (lambda: finetune.export("run", "out", max_shard_size="2 of"), "export: max_shard_size: '2 of' is not a size"),
        (
            lambda: finetune.export("run", "out", gguf="q8_0"),
            r"export: gguf: must be a list of GGUF types; found 'q8_0'; write \['q8_0'\]",
        ),
        (lambda: finetune.export("run", "out", gguf=[8]), r"export: gguf: must be a list of GGUF types; found \[8\]"),
        (lambda: finetune.export("run", "out", gguf=["q9"]), "the type 'q9' is unknown"),
        (lambda: finetune.fold(3, "out"), "fold: checkpoint: must be a run directory, .*; found 3"),
        (lambda: finetune.fold("nano", 3), "fold: output: must be a path .*; found 3"),
        (lambda: finetune.fold("nano", "out", dtype=16), "dtype: 16 is unknown"),
        (
            lambda: finetune.fold("nano", "out", max_shard_size=None),
            "fold: max_shard_size: must be a text .*; found None",
        ),
        (lambda: finetune.fold("nano", "a\0b"), r"fold: output: must be a path .*; found 'a\\x00b'"),
        (lambda: finetune.open_model(None), "open_model: name: must be a run directory, .*; found None"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(tmp_path, monkeypatch, call, message):
    """They were tracebacks of pathlib, and `gguf="q8_0"` was read letter by letter."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FinetuneError, match=message) as caught:
        call()
    assert "--" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Bytes that are no UTF-8 come from a command line in this form; they were a traceback of the tokenizer.
        (("a\udcff",), r"answer: messages: 'a\\udcff' holds half a character; write it as UTF-8"),
        ((5,), "answer: messages: must be a question, or a list of turns with role and content; found 5"),
        (([],), r"answer: messages: must be .*; found \[\]"),
        ((["Hello!"],), r"answer: messages: must be .*; found \['Hello!'\]"),
        (("Hello!", "many"), "answer: max_new_tokens: must be a whole number of 1 or more; found 'many'"),
        (("Hello!", 0), "answer: max_new_tokens: must be a whole number of 1 or more; found 0"),
        (("Hello!", 1, "warm"), "answer: temperature: must be a number of 0 or more; found 'warm'"),
        (("Hello!", 1, -0.5), "answer: temperature: must be a number of 0 or more; found -0.5"),
    ],
)
def test_arguments_of_an_answer_are_named(nano_llama, arguments, message):
    with pytest.raises(FinetuneError, match=message):
        finetune.open_model(nano_llama).answer(*arguments)
