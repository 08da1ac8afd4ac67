"""Write the steps of a cleaning that need no model as a pipeline of datatrove, for more rows than one machine takes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from finetune.cleaning.clean_run import check_clean
from finetune.cleaning.cluster_rows import list_parts
from finetune.cleaning.step_table import STEPS
from finetune.data.lint.near_duplicates import choose_bands
from finetune.errors import OutputError, RecipeError
from finetune.files.folders import write_new_file
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.training_rows import read_data_settings

_MOST_TASKS = 1000


@dataclass(frozen=True)
class EmitReport:
    """The file, the steps in it, and what of the recipe is not in it, with the reason."""

    output: str
    steps: list[str]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def emit_datatrove(resolved: ResolvedRecipe, recipe: str, settings: Sequence[str], output: Path) -> EmitReport:
    """Write the pipeline; `recipe` and `settings` are what the recipe was loaded from.

    Raises:
        RecipeError: the recipe has no step that a pipeline can do.
        OutputError: the file exists, cannot be written, or has a name that Python does not import.
    """
    if "." in output.stem or output.stem == "datatrove":
        raise OutputError(
            f"{output}: tasks import the pipeline by its name; choose one without further dots, such as pipeline.py"
        )
    on = [step for step in STEPS if step.is_on(resolved.recipe.clean)]
    check_clean(resolved, on)
    section = resolved.recipe.clean
    steps = [step.name for step in on if step.is_clustered]
    if not steps:
        names = ", ".join(step.name for step in STEPS if step.is_clustered)
        raise RecipeError("clean", [f"clean: names no step that datatrove can do; it can do {names}"])
    left_out = {step.name: "it asks a model, or needs all rows at once" for step in on if not step.is_clustered}
    if "near_duplicates" in steps and section.near_duplicates.best_by:
        left_out["near_duplicates.best_by"] = "of rows that are nearly the same the first stays"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["repr"] = repr
    near = section.near_duplicates
    text = environment.get_template("datatrove_pipeline.py.jinja").render(
        recipe=str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe,
        settings=list(settings),
        output=output.stem,
        steps=steps,
        left_out=left_out,
        tasks=max(1, min(_MOST_TASKS, len(list_parts(read_data_settings(resolved).train)))),
        section=section,
        bands=choose_bands(near.threshold or 1.0, near.permutations),
    )
    write_new_file(output, text + "\n")
    return EmitReport(str(output), steps, left_out)


def describe_emit(report: EmitReport) -> str:
    """Return the report for a terminal."""
    lines = [f"{report.output}: {', '.join(report.steps)}; it needs datatrove: python {report.output}"]
    lines += [f"not in it: {name}, {reason}" for name, reason in report.left_out.items()]
    if report.left_out:
        lines.append("Run `finetune clean` with these steps over what the pipeline has written.")
    return "\n".join(lines)
