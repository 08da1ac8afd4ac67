"""Write the report of a cleaning as one HTML page that needs no network and no other file."""

from dataclasses import replace
from pathlib import Path

from finetune.cleaning.clean_report import CleanReport, StepReport, name_example
from finetune.data.preview.page import make_environment


def render_clean_page(report: CleanReport) -> str:
    """Return the page as HTML. All text in it is escaped, and no script can run. Files stand without their folders."""
    environment = make_environment(Path(__file__).parent)
    environment.globals["name_example"] = name_example
    page = environment.get_template("clean_page.html.jinja")
    return page.render(report=report, steps=[_shorten_names(step) for step in report.steps])


def _shorten_names(step: StepReport) -> StepReport:
    """Return a step whose examples name files without folders: the page may be sent to others."""
    examples = [replace(example, file=Path(example.file).name) for example in step.examples]
    return replace(step, examples=examples)
