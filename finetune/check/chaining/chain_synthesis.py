"""Stages of a chain that let the run before them write rows, and the stages that train on these."""

from collections.abc import Iterator
from pathlib import Path

from finetune.check.chain_stages import RUN_ENDPOINT, Content, Stage, SynthesizeStage
from finetune.files.resources import find_demo_data
from finetune.runs.run_files import WRITTEN_ROWS_FILE

WRITING_KEYS = ("data", "endpoints", "seed", "synthesize")


def find_written_rows(stage: Stage | None) -> Path | None:
    """Return the file of rows that a stage will write, or None for other stages."""
    return stage.output / WRITTEN_ROWS_FILE if isinstance(stage, SynthesizeStage) else None


def list_foreign_keys(content: Content) -> Iterator[str]:
    """Yield a problem for each key that does not belong to a stage that writes rows."""
    for key in content:
        if key not in WRITING_KEYS:
            yield f"{key}: does not belong to a stage that synthesizes; remove it"


def add_run_endpoint(content: Content, checkpoint: str) -> None:
    """Add the endpoint `run`, which stands for the run before, and make it the writer where the stage names none."""
    endpoints, section = content.setdefault("endpoints", {}), content.get("synthesize")
    if isinstance(endpoints, dict):
        endpoints[RUN_ENDPOINT] = {"model": checkpoint}
    if isinstance(section, dict):
        section.setdefault("endpoint", RUN_ENDPOINT)


def use_written_rows(content: Content, item: Content) -> Iterator[str]:
    """Let bundled pairs stand for the rows that the stage before will write, so that checks and plans work before it has run.

    Nobody has seen either of them, so rows that are too long are left out and counted, unless the recipe says otherwise.
    """
    own = item.get("data")
    if isinstance(own, dict) and "train" in own:
        yield "data.train: this stage trains on the rows of the stage before; remove this key"
    data = content.setdefault("data", {})
    if isinstance(data, dict):
        content["data"] = {"overflow": "drop", **data, "train": str(find_demo_data("pairs.jsonl"))}
