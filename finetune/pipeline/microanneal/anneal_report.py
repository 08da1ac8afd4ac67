"""Write the report of a micro-annealing."""

from pathlib import Path

from finetune.files.json_files import write_json, write_text
from finetune.files.terminal import escape_controls
from finetune.pipeline.microanneal.anneal_plot import PICTURE_FILE
from finetune.pipeline.microanneal.anneal_results import AnnealReport

REPORT_FILE, TEXT_FILE = "microanneal.json", "report.md"


def write_anneal(report: AnnealReport, folder: Path) -> None:
    """Write the report as JSON and text."""
    text = escape_controls(report.describe()).replace("`", "'")
    write_text(folder / TEXT_FILE, f"# Micro-annealing\n\n```\n{text}\n```\n\n![{PICTURE_FILE}]({PICTURE_FILE})\n")
    write_json(folder / REPORT_FILE, report.to_json())
