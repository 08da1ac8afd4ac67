"""Run directories that hold only what a page reads."""

import json

import pytest

from finetune.runs.run_files import ANSWERS_FILE, MACHINE_FILE, MEASURED_ROWS_FILE, METRICS_FILE, RECORD_FILE

SPLIT = {"rows": 9, "trained_tokens": 50, "tokens": 90, "median": 8, "longest": 20, "dropped": 1, "truncated": 0}
ROWS = {"histogram": [[16, 6], [32, 3]], "sources": {"a.jsonl": [6, 60], "b.jsonl": [3, 30]}, "bad": 0}


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes a run directory with so many logged steps."""

    def write(name="run", steps=10, *, rate=0.1, result=None, answers=(), notes=(), lines=(), **files):
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        trainer = {"learning_rate": rate, "max_steps": 20}
        record = {
            "status": "finished" if result else "running",
            "recipe": {"method": "sft", "model": {"checkpoint": "nano"}, "trainer": trainer, "output": str(run)},
            "data": {
                "train": {**SPLIT, **ROWS},
                "evaluation": None,
                "notes": list(notes),
                "left_out": {"duplicate": 2},
            },
            "planned_bytes": 7_200_000_000,
            "result": result,
        }
        lines = lines or [
            {"step": step, "loss": 3 - step / steps, "learning_rate": rate} for step in range(1, steps + 1)
        ]
        machine, rows = files.get("machine", ()), files.get("rows")
        (run / MACHINE_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in machine))
        if rows is not None:
            (run / MEASURED_ROWS_FILE).write_text(json.dumps(rows))
        (run / RECORD_FILE).write_text(json.dumps(record))
        (run / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (run / ANSWERS_FILE).write_text(json.dumps(answers))
        return run

    return write
