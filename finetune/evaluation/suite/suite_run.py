"""Evaluate a model on tasks of lm-evaluation-harness: its prompts, its scores, the kit's model and its files of samples."""

import importlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from finetune.evaluation.asking.asked_model import AskedModel
from finetune.evaluation.suite.suite_model import make_suite_model
from finetune.evaluation.suite.suite_tasks import Suite
from finetune.evaluation.tasks.task_forms import Protocol
from finetune.evaluation.tasks.task_names import SUITE_PREFIX
from finetune.evaluation.tasks.task_results import SampleFile, TaskResult
from finetune.files.json_files import write_text
from finetune.files.safety.disk_errors import translate_os_errors

# The seeds of its command line.
_SEED, _OTHER_SEED = 0, 1234
_ONLY_FILTER = "none"


def ask_suite(
    suite: Suite, asked: AskedModel, protocol: Protocol, folder: Path, limit: int | None, unsafe_code: bool
) -> Iterator[TaskResult]:
    """Yield the results of each task and of each group of tasks; answers are kept in the folder as they come."""
    library = importlib.import_module("lm_eval.evaluator")
    for name, loaded in suite.tasks.items():
        file = folder / f"{_name_file(name)}.answers.jsonl"
        model = make_suite_model(asked, SampleFile(file, lambda sample: "answer" in sample))
        _set_seeds(loaded["tasks"])
        found = library.evaluate(
            model,
            loaded,
            limit=limit,
            apply_chat_template=asked.chat,
            fewshot_as_multiturn=asked.chat,
            confirm_run_unsafe_code=unsafe_code,
        )
        for label in found["results"]:
            file = folder / f"{_name_file(label)}.jsonl"
            if label in found["samples"]:
                with translate_os_errors(file, "the answers are kept; the same command continues"):
                    write_text(file, "".join(map(_write_line, found["samples"][label])))
            yield _read_result(label, found, protocol, file)


def _set_seeds(tasks: Mapping[str, Any]) -> None:
    """Draw few-shot examples as its command line does; a task that names no number of them gets none."""
    random.seed(_SEED)
    numpy.random.seed(_OTHER_SEED)  # its tasks draw from this one
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_OTHER_SEED)


def _name_file(name: str) -> str:
    return f"lm_eval-{name.replace('/', '-')}"


def _write_line(sample: Mapping[str, Any]) -> str:
    return json.dumps({"row": sample["doc_id"], **sample}, default=str) + "\n"


def _read_result(label: str, found: Mapping[str, Any], protocol: Protocol, file: Path) -> TaskResult:
    """Return the figures under their names there, such as `acc`, or `exact_match,strict-match` where answers are filtered."""
    metric: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    for key, value in found["results"][label].items():
        name, _, rule = key.partition(",")
        if not rule or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found["results"][label].get(f"{name}_stderr,{rule}")
        shown = name if rule == _ONLY_FILTER else key
        metric[shown], stderr[shown] = float(value), float(error) if isinstance(error, int | float) else None
    counts = found["n-samples"]
    inside = found["group_subtasks"].get(label, [label])
    n = sum(int(counts[one]["effective"]) for one in _list_leaves(inside, found["group_subtasks"]) if one in counts)
    return TaskResult(f"{SUITE_PREFIX}{label}", protocol, n, metric, stderr, None, str(file) if file.is_file() else "")


def _list_leaves(names: list[str], groups: Mapping[str, list[str]]) -> list[str]:
    return [leaf for name in names for leaf in (_list_leaves(groups[name], groups) if name in groups else [name])]
