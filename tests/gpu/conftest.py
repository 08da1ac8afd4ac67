"""A machine with a GPU may be lent for minutes only, so every result is told and kept at once.

gpu.py names in `GPU_TEST_RESULTS` a file of lines of JSON to which each result is added, and says it. With `GPU_TEST_MISSING` the tests that passed by that
file are left out. With `GPU_TEST_REHEARSAL` the tests that can run on a processor do so, which shows mistakes in the tests themselves.
"""

import json
import os
import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    """Leave out what passed before, if only what is missing is to be measured."""
    file = Path(os.environ.get("GPU_TEST_RESULTS") or os.devnull)
    if "GPU_TEST_MISSING" not in os.environ or not file.is_file():
        return
    rows = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1])
    passed = {row["name"] for row in rows if row["outcome"] == "passed"}
    config.hook.pytest_deselected(items=[item for item in items if item.name in passed])
    items[:] = [item for item in items if item.name not in passed]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Print how long each test took and the end of a failure as soon as it is known, and keep the result."""
    outcome = yield
    report = outcome.get_result()
    if "GPU_TEST_RESULTS" not in os.environ:
        return
    if report.when == "call" and not report.skipped:
        print(f"{report.outcome} {report.duration:.1f} s {item.name}", file=sys.__stderr__, flush=True)
    if report.failed:
        print("\n".join(report.longreprtext.splitlines()[-25:]), file=sys.__stderr__, flush=True)
    # A test that fails before it runs, or after, counts as failed; one that is skipped ends before it runs.
    if report.when == "call" or not report.passed:
        row = {"name": item.name, "outcome": report.outcome, "seconds": round(report.duration, 1)}
        with Path(os.environ["GPU_TEST_RESULTS"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
