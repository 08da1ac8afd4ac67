"""Code never reads its own messages: what a caller needs to know is a field of the error, and the text is made last."""

import ast
import copy
import inspect
import re
from pathlib import Path

import pytest

from finetune import api
from finetune.api_arguments import OPTIONS, name_option
from finetune.errors import DataError, Place, describe_unknown_name

PACKAGE = Path(__file__).parents[1] / "finetune"
READING = {
    "endswith",
    "find",
    "index",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rpartition",
    "rsplit",
    "split",
    "startswith",
}
# What another library says may be shortened for a person; it has no field for its first sentence, nor for the option that it is about.
FOREIGN = {
    ("pipeline/memory_ladder.py", "torch.OutOfMemoryError"),
    ("training/option_trials.py", "Exception"),
    # csv has one class for all faults of a file.
    ("data/reading/raw_files.py", "csv.Error"),
    # gloo tells of a lost connection by a RuntimeError without a type of its own.
    ("models/engine.py", "RuntimeError"),
}


def find_errors(function):
    """Yield the names in a tree that hold an error, each with its type as it is written."""
    for node in ast.walk(function):
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, ast.unparse(node.type)
        elif (
            isinstance(node, ast.arg)
            and node.annotation
            and ast.unparse(node.annotation).endswith(("Error", "ception"))
        ):
            yield node.arg, ast.unparse(node.annotation)


def find_readings(source, file=""):
    """Yield the lines that look into the text of an error, or into a name that was assigned such a text."""
    for scope in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.Module)]:
        errors = {name for name, kind in find_errors(scope) if (file, kind) not in FOREIGN}
        texts = {f"str({name})" for name in errors}
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and ast.unparse(node.value) in texts:
                texts |= {ast.unparse(target) for target in node.targets}
        yield from (node.lineno for node in ast.walk(scope) if texts & set(map(ast.unparse, list_read(node))))


def list_read(node):
    """Return what an expression looks into: the text before a method, behind `in`, or given to `re`."""
    if isinstance(node, ast.Attribute) and node.attr in READING:
        return [node.value]
    if isinstance(node, ast.Compare) and any(isinstance(operator, ast.In | ast.NotIn) for operator in node.ops):
        return node.comparators
    return node.args if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") else []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_reads_the_text_of_an_error(path):
    lines = sorted(set(find_readings(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())))
    assert not lines, f"{path.name} reads the text of an error in lines {lines}; give the error a field"


@pytest.mark.parametrize(
    "line",
    [
        "where, _, fault = str(error).partition(': ')",
        "where = str(error).rpartition(': ')[0]",
        "parts = str(error).split('; ')",
        "text = str(error).replace('--size', 'size')",
        "text = str(error).removeprefix('x: ')",
        "is_own = str(error).startswith('x')",
        "is_own = 'x' in str(error)",
        "is_own = 'x' not in str(error)",
        "text = str(error); is_own = 'x' in text",
        "text = str(error); where = text.partition(': ')",
        "found = re.search('line ([0-9]+)', str(error))",
    ],
)
def test_what_counts_as_reading(line):
    assert list(find_readings(f"try:\n    pass\nexcept ValueError as error:\n    {line}\n"))


@pytest.mark.parametrize(
    "line",
    ["text = str(error)", "text = str(error).splitlines()[0]", "text = f'{error}'", "text = name.partition('.')"],
)
def test_what_does_not_count_as_reading(line):
    assert not list(find_readings(f"try:\n    pass\nexcept ValueError as error:\n    {line}\n"))


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place("data/my.jsonl", 18), "data/my.jsonl, line 18"),
        (Place("data/my.parquet", 3, "row"), "data/my.parquet, row 3"),
        (Place("data/a, line 1.jsonl"), "data/a, line 1.jsonl"),
    ],
)
def test_a_place_as_text_and_its_fields(place, text):
    assert str(place) == text
    assert Place(**vars(place)) == place
    assert copy.copy(place) == place


def test_a_data_error_keeps_its_fields_and_makes_its_message_of_them():
    error = DataError("the conversation is empty", Place("a: b.jsonl", 2), "empty_text")
    for same in (error, copy.copy(error)):
        assert str(same) == "a: b.jsonl, line 2: the conversation is empty"
        assert (same.fault, same.place, same.kind) == (error.fault, error.place, error.kind)
    plain = DataError("no row is left")
    assert (str(plain), plain.place, plain.kind) == ("no row is left", None, "unreadable")


def test_an_unknown_name_is_called_what_the_caller_calls_it():
    assert describe_unknown_name("methud", ["method"], "unknown key") == "unknown key; did you mean 'method'?"
    assert describe_unknown_name("unknown", ["a", "b"]) == "unknown; known are a, b"


BELOW_CLI = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("cli", "guide"))
# A whole command is clear to everybody; its options stand between its name and the end of the sentence.
COMMAND = re.compile(r"finetune [a-z]+[^`;,\n]*")


def list_texts(source):
    """Yield the texts of a module, with `…` for what is filled in; docstrings are no messages."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(getattr(node, "body", None), list) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inner:
            yield node.value


@pytest.mark.parametrize("path", BELOW_CLI, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_messages_for_python_programs_do_not_name_options_of_the_command_line_alone(path):
    """A program that called `finetune.train` was told to give `--resume`."""
    options = {option.partition(" ")[0] for option in OPTIONS}
    texts = [COMMAND.sub("", text) for text in list_texts(path.read_text(encoding="utf-8"))]
    named = sorted(text for text in texts if options & set(re.findall(r"--[a-z-]+", text)) and text not in OPTIONS)
    assert not named, "say both with finetune.api_arguments.name_option"


def test_both_spellings_of_an_option():
    assert name_option("--resume") == "--resume (resume=True in Python)"
    parameters = {
        name for function in (api.train, api.plan, api.export) for name in inspect.signature(function).parameters
    }
    assert {text.partition("=")[0] for text in OPTIONS.values()} <= parameters
