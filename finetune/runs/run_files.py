"""Name the files and folders that runs, chains and exports write, and find them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.files.json_files import read_lines

# Files of a run directory. The folder of a chain has a recipe as well.
RECIPE_FILE, RECORD_FILE = "recipe.yaml", "run.json"
METRICS_FILE, LOSS_PLOT_FILE = "metrics.jsonl", "loss.png"
# Metrics of pre-training: the norm of the head as the model uses it, and the z term of the loss in nats a token.
HEAD_NORM, Z_TERM = "lm_head_norm", "z_term"
# What the scores of tasks begin with in metrics.jsonl, behind `eval_`.
TASK_SCORES = "task/"
ANSWERS_FILE, ANSWERS_PAGE = "answers.json", "answers.md"
# The answers to the same prompts at each evaluation.
EVALUATED_ANSWERS_FILE = "answers_by_step.jsonl"
# Where a prompt comes from that every run asks, in place of a row.
FIXED_ORIGIN = "fixed"
REPORT_FILE = "report.html"
COMPLETIONS_FILE = "completions.jsonl"
# What the page shows beside the metrics: single rows with their losses, and the machine's state at each logged step.
MEASURED_ROWS_FILE, MACHINE_FILE = "row_losses.json", "machine.jsonl"
PISSA_START_FOLDER = "pissa-start"
# The folder of a result, one of these two in the run directory, and its files.
ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
LINEAGE_FILE, SAMPLE_ROWS_FILE, TEXT_SAMPLES_FILE = "finetune.json", "rows.json", "texts.json"
PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# The trainer's own state in each of its checkpoints, and what the kit counts beside it.
TRAINER_STATE_FILE, COUNTS_FILE = "trainer_state.json", "counts.json"
# The record of a chain, and the report of an export.
CHAIN_RECORD_FILE, EXPORT_REPORT_FILE = "chain.json", "export.json"
# The rows that `finetune synthesize` or a stage of a chain has written.
WRITTEN_ROWS_FILE = "rows.jsonl"

# What a run makes in its directory besides its checkpoints.
MADE_FILES = (
    RECIPE_FILE,
    RECORD_FILE,
    METRICS_FILE,
    LOSS_PLOT_FILE,
    ANSWERS_FILE,
    ANSWERS_PAGE,
    EVALUATED_ANSWERS_FILE,
    REPORT_FILE,
    COMPLETIONS_FILE,
    MEASURED_ROWS_FILE,
    MACHINE_FILE,
    "README.md",
)
MADE_FOLDERS = (PISSA_START_FOLDER, ADAPTER_FOLDER, MODEL_FOLDER)
_MOST_DIGITS = 18  # longer names are not from a trainer


def describe_origin(origin: str) -> str:
    """Return where a prompt in a run's answers comes from, for a person."""
    return "A fixed question" if origin == FIXED_ORIGIN else origin


def find_result_folder(run: Path) -> Path | None:
    """Return the folder of a finished run's result, or None where there is none yet."""
    folders = (run / ADAPTER_FOLDER, run / MODEL_FOLDER)
    return next((folder for folder in folders if folder.is_dir()), None)


def list_trainer_checkpoints(run: Path) -> list[Path]:
    """Return the folders `checkpoint-<step>` of a run, the newest first, complete or not."""
    return sorted(
        (path for path in run.glob("checkpoint-*") if read_step(path) >= 0 and path.is_dir()),
        key=lambda path: -read_step(path),
    )


def name_inner_run(folder: Path) -> str:
    """Return "name one inside, such as …" for a folder that is no run and holds some, such as a chain's, or an empty text."""
    inside = sorted(folder.glob(f"*/{RECORD_FILE}")) or sorted(folder.glob(f"*/*/{RECORD_FILE}"))
    return f"name one inside, such as {inside[0].parent}" if inside else ""


def is_checkpoint_of_run(path: Path) -> bool:
    """Tell whether a folder is a checkpoint `checkpoint-<step>` that a run of this kit wrote, complete or not."""
    path = path.resolve()
    return path in list_trainer_checkpoints(path.parent) and (path.parent / RECORD_FILE).is_file()


def read_step(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder, or -1 for another name."""
    found = re.fullmatch("checkpoint-([0-9]+)", checkpoint.name)
    return int(found[1]) if found is not None and len(found[1]) < _MOST_DIGITS else -1


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the logged lines of a run, oldest first."""
    return [line for _, line in read_lines(run / METRICS_FILE)]


def count_tokens_seen(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return the tokens that a run has seen by the last of its logged lines."""
    return int(max((line.get("num_tokens") or line.get("num_input_tokens_seen") or 0 for line in lines), default=0))
