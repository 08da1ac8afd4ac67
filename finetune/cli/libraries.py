"""Keep the libraries quiet, print in one process only, and warn of libraries that the kit was not tried with."""

import logging
import sys

from finetune.files.launcher import is_main_process
from finetune.files.terminal import escape_controls, silence_libraries
from finetune.files.version import list_other_versions


class _SafeFormatter(logging.Formatter):
    """Escapes control characters, which file names and rows may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def quiet_libraries() -> None:
    """Print the kit's notes to standard error as plain lines, and suppress the libraries' notes and warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter("%(message)s"))
    ours = logging.getLogger("finetune")
    ours.handlers = [handler]  # replaced, so that repeated calls from another program add no second handler
    ours.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    silence_libraries()
    for fault in list_other_versions():
        ours.warning("%s", fault)
