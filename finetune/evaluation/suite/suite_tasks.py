"""Find the tasks of lm-evaluation-harness, which stands behind the extra `evaluate`."""

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError, FinetuneError, Place, describe_unknown_name
from finetune.evaluation.tasks.task_names import SUITE_PREFIX
from finetune.files.folders import expand_home

_PACKAGE = "lm_eval"
_EXPLAINED = 300


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-evaluation-harness by the names that were asked for, with the `TaskDict` of each: its tasks and its groups."""

    version: str
    tasks: dict[str, Any]


def split_names(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide names of tasks into the kit's own and those of lm-evaluation-harness, without their prefix."""
    own = tuple(name for name in names if not name.startswith(SUITE_PREFIX))
    return own, tuple(dict.fromkeys(name.removeprefix(SUITE_PREFIX) for name in names if name.startswith(SUITE_PREFIX)))


def load_suite(names: Sequence[str], folder: Path | None, *, unsafe_code: bool) -> Suite:
    """Load tasks by their names; a folder may hold files of further tasks.

    Raises:
        FinetuneError: the package is missing, a task is unknown or runs code.
        DataError: a task's rows or its file cannot be read.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        raise FinetuneError(
            f"--tasks: {SUITE_PREFIX}{names[0]} needs lm-evaluation-harness; install it: pip install 'yulan-finetune[evaluate]'"
        )
    if folder is not None and not (folder := expand_home(folder)).is_dir():
        raise DataError(
            f"must be a folder with files of tasks, because {SUITE_PREFIX}{names[0]} is asked for", Place(str(folder))
        )
    library = importlib.import_module(_PACKAGE)  # it takes seconds
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            known = manager.all_tasks
            raise FinetuneError(f"--tasks: {SUITE_PREFIX + name!r} is {_describe_unknown(name, known)}")
    return Suite(str(library.__version__), {name: _load(manager, name, unsafe_code=unsafe_code) for name in names})


def _describe_unknown(name: str, known: Sequence[str]) -> str:
    text = describe_unknown_name(name, known, "an unknown task")
    # All names would fill the screen: there are thousands.
    return text if len(text) <= _EXPLAINED else "an unknown task; `lm_eval ls tasks` lists them"


def _load(manager: Any, name: str, *, unsafe_code: bool) -> Any:
    # Before it is loaded, because its loading already fetches a program and runs it.
    if (manager.task_index[name].cfg or {}).get("unsafe_code") and not unsafe_code:
        raise _refuse_code(name)
    logging.getLogger(_PACKAGE).setLevel(logging.ERROR)
    try:
        loaded = manager.load([name])
    except Exception as error:  # YAML files, their functions and the libraries that read rows raise many kinds
        what = " ".join(f"{type(error).__name__}: {error}".split())[:_EXPLAINED]
        raise DataError(
            f"the task or its rows cannot be read ({what}); with --task-data FOLDER it may be a task of yours with local files",
            Place(f"{SUITE_PREFIX}{name}"),
        ) from error
    for label, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
            raise _refuse_code(label)
        if getattr(task, "MULTIMODAL", False):
            raise FinetuneError(
                f"--tasks: {SUITE_PREFIX}{label} shows pictures or sounds, which this model cannot read"
            )
    return loaded


def _refuse_code(name: str) -> FinetuneError:
    return FinetuneError(
        f"--tasks: {SUITE_PREFIX}{name} runs generated code without a sandbox; humaneval and mbpp of this kit run in one, and "
        "--unsafe-code allows it"
    )
