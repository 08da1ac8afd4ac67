"""A machine with a GPU may be lent for minutes only, so a failure is told at once."""

import sys

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Print the end of a failure as soon as it is known, and how long each test took."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and not report.skipped:
        print(f"{report.outcome} {report.duration:.1f} s {item.name}", file=sys.__stderr__, flush=True)
    if report.failed:
        print("\n".join(report.longreprtext.splitlines()[-25:]), file=sys.__stderr__, flush=True)
