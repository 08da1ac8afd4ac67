"""The table of tasks: their columns, and where their rows come from. It imports no torch, so that a recipe is checked quickly."""

from dataclasses import dataclass

from finetune.data.settings import HubDataset


@dataclass(frozen=True)
class Task:
    """A task: its columns of text, and the data set of the hub that is read where no file is named.

    `lists` are columns of lists of texts, and `numbers` columns that a row may have besides.
    """

    name: str
    columns: tuple[str, ...]
    hub: HubDataset
    lists: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


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
        ),
    )
}
