"""Read the results of all checkpoints, and compare them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.checkpoints.checkpoint_table import find_published
from finetune.growth.growth_report import CheckpointEntry, Growth
from finetune.growth.scores.score_lines import (
    PUBLISHED_PROTOCOL,
    ScoreLine,
    list_published_measures,
    make_measured_lines,
    make_published_lines,
)
from finetune.growth.tokens_seen import find_tokens_seen
from finetune.growth.weights.weight_changes import read_weights
from finetune.pipeline.dynamics.dynamics_inputs import (
    TASKS,
    WEIGHTS,
    Inputs,
    recall_activity,
    recall_tasks,
    recall_tuned,
)
from finetune.pipeline.dynamics.tuning import describe_tuning, plan_tuning
from finetune.pipeline.dynamics.visits import Visit, list_other_checkpoints
from finetune.pipeline.same_speed import describe_choices
from finetune.runs.results import find_earlier


def gather(visits: Sequence[Visit], inputs: Inputs, output: Path) -> Growth:
    """Read the results of all checkpoints and compare them."""
    entries = []
    for number, visit in enumerate(visits):
        before = visits[number - 1].folder / WEIGHTS if number else None
        tuning = inputs.settings.tuning
        entries.append(
            CheckpointEntry(
                visit.label,
                find_tokens_seen(visit.name),
                visit.read_record().get("commit"),
                read_weights(visit.folder / WEIGHTS, before),
                recall_activity(visit, inputs) if inputs.texts else None,
                None if tuning is None else describe_tuning(plan_tuning(visit, tuning)),
            )
        )
    protocol = inputs.tasks.protocol if inputs.prepared else ""
    lines = tuple(_compare(visits, inputs))
    notes = [note for one in inputs.prepared for note in one.notes]
    if protocol != PUBLISHED_PROTOCOL and any(line.origin == "published" for line in lines):
        notes.append(
            f"the published scores are taken to come from the protocol {PUBLISHED_PROTOCOL}, not from {protocol}"
        )
    notes += [*_describe_speed(visits, inputs), *_describe_left_out(visits, inputs, output)]
    return Growth(str(output), protocol, tuple(entries), lines, tuple(dict.fromkeys(notes)))


def _describe_speed(visits: Sequence[Visit], inputs: Inputs) -> tuple[str, ...]:
    if (tuning := inputs.settings.tuning) is None:
        return ()
    return describe_choices(
        {visit.label: plan_tuning(visit, tuning).resolved.output for visit in visits}, "fine-tunings"
    )


def _describe_left_out(visits: Sequence[Visit], inputs: Inputs, output: Path) -> Iterator[str]:
    """Say which checkpoints and tasks of an earlier, wider call the folder still holds, since this table takes the place of theirs."""
    asked = {one.form.task for one in inputs.prepared}
    tasks = {file.stem for visit in visits for file in visit.folder.glob(f"{TASKS}/*.jsonl")} - asked
    held = {"checkpoints": list_other_checkpoints(visits, output), "tasks": sorted(tasks)}
    parts = [f"{kind} {', '.join(names)}" for kind, names in held.items() if names]
    if parts:
        yield (
            f"the folder also holds results that are not in this table, of the {' and of the '.join(parts)}; they are kept: name them "
            "again to have them in it"
        )


def _compare(visits: Sequence[Visit], inputs: Inputs) -> Iterator[ScoreLine]:
    if not inputs.prepared:
        return
    published = [None if find_earlier(visit.name) else find_published(visit.name) for visit in visits]
    yield from make_published_lines(published, list_published_measures(inputs.prepared))
    measured = [evaluation for visit in visits if (evaluation := recall_tasks(visit, inputs)) is not None]
    yield from make_measured_lines(inputs.prepared, measured, "measured")
    if inputs.settings.tuning is not None:
        tunings = [plan_tuning(visit, inputs.settings.tuning) for visit in visits]
        found = (recall_tuned(visit, tuning, inputs) for visit, tuning in zip(visits, tunings, strict=True))
        yield from make_measured_lines(inputs.prepared, [one for one in found if one is not None], "tuned")
