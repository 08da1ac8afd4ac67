"""The table of tasks: their columns, and where their rows come from. It imports no torch, so that a recipe is checked quickly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.reading.file_kinds import has_known_ending
from finetune.data.settings import HubDataset
from finetune.errors import describe_unknown_name

# Before the name of a task of lm-evaluation-harness.
SUITE_PREFIX = "lm_eval:"


@dataclass(frozen=True)
class Shots:
    """How many exemplars stand before a question; they have its columns, and `hub_split` is where they come from by default."""

    count: int
    hub_split: str | None
    missing: str = ""


GSM8K_SHOTS = Shots(5, hub_split="train")
MBPP_SHOTS = Shots(3, hub_split="prompt")


@dataclass(frozen=True)
class Task:
    """A task: its columns of text, and the data set of the hub that is read where no file is named.

    `lists` are columns of lists of texts, and `numbers` columns that a row may have besides. `shots` are the exemplars of the
    harness's protocol.
    """

    name: str
    columns: tuple[str, ...]
    hub: HubDataset
    lists: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    shots: Shots | None = None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "lambada",
            ("text",),
            HubDataset("EleutherAI/lambada_openai", "default", "test", "900124bf3b8235c6daf21033af9948b3f07346c4"),
        ),
        Task(
            "gsm8k",
            ("question", "answer"),
            HubDataset("openai/gsm8k", "main", "test", "740312add88f781978c0658806c59bc2815b9866"),
            shots=GSM8K_SHOTS,
        ),
        Task(
            "humaneval",
            ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
            HubDataset(
                "openai/openai_humaneval", "openai_humaneval", "test", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"
            ),
        ),
        Task(
            "mbpp",
            ("text", "code"),
            HubDataset("google-research-datasets/mbpp", "full", "test", "4bb6404fdc6cacfda99d4ac4205087b89d32030c"),
            lists=("test_list",),
            numbers=("task_id",),
            shots=MBPP_SHOTS,
        ),
    )
}

# In a folder, the rows or the exemplars of a task lie in a file of its name, alone or with one of these behind it.
ROW_ENDINGS = ("", "_test", "-test", "_eval", "_openai", "_openai_test")
EXEMPLAR_ENDINGS = ("_train", "-train", "_exemplars", "_prompt", "")


def describe_unknown_task(name: str) -> str:
    """Return what stands behind an unknown name where only the kit's own tasks can be asked."""
    if name.startswith(SUITE_PREFIX):
        return (
            f"a task of lm-evaluation-harness, which only `finetune evaluate MODEL --tasks {name}` asks; here name one of "
            f"{', '.join(sorted(TASKS))}"
        )
    return describe_unknown_name(name, TASKS, "an unknown task")


def find_in_folder(task: Task, folder: Path, endings: Sequence[str]) -> Path | None:
    """Return the file of a task among the data files of a folder, or None where there is none."""
    files = sorted(file for file in folder.iterdir() if has_known_ending(file))
    stems = {file.name.split(".")[0].lower(): file for file in files}
    return next((stems[stem] for ending in endings if (stem := f"{task.name}{ending}") in stems), None)


def describe_wanted(task: Task, endings: Sequence[str]) -> str:
    """Say that a folder holds no file of a task, and how one is named."""
    return f"holds no file of {task.name}, such as {task.name}{endings[0]}.jsonl or {task.name}{endings[1]}.jsonl"
