"""The table of tasks: their columns, and where their rows come from. It imports no torch, so that a recipe is checked quickly."""

from dataclasses import dataclass

from finetune.data.settings import HubDataset


@dataclass(frozen=True)
class Task:
    """A task: its columns, and the data set of the hub that is read where no file is named."""

    name: str
    columns: tuple[str, ...]
    hub: HubDataset


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lambada", ("text",), HubDataset("EleutherAI/lambada_openai", "default", "test")),
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
    )
}
