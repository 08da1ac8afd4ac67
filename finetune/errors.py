"""The errors that are the user's to mend.

    FinetuneError           anything below; the command line prints it without a traceback and exits with 2
    ├── RecipeError         a recipe with one or more problems
    ├── CheckpointError     a start that cannot be found or read, or cannot be folded
    ├── DataError           a data file or row
    ├── TemplateError       a chat template that cannot be used
    ├── TrainingError       a run that must not start, or cannot go on
    ├── ExportError         an adapter that does not fit its base, or an export that failed its comparison
    ├── OutputError         a folder that cannot be written: not empty, no permission, no space
    └── MachineError        something this machine cannot do

Every message says what is wrong, where, what was found, what would be right, and what to do.
Anything else that is raised is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """The user's input cannot be used as it is; the message says why and what to do."""


class RecipeError(FinetuneError):
    """A recipe has problems; `problems` holds one sentence for each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))


class CheckpointError(FinetuneError):
    """A checkpoint cannot be found, read or folded."""


class DataError(FinetuneError):
    """A data file or one of its rows cannot be used."""


class TemplateError(FinetuneError):
    """A chat template cannot be used for training."""


class TrainingError(FinetuneError):
    """A run must not start, or cannot be resumed."""


class ExportError(FinetuneError):
    """A model cannot be exported, or the export is not equal to what was trained."""


class OutputError(FinetuneError):
    """An output folder cannot be written."""


class MachineError(FinetuneError):
    """This machine lacks what was asked for."""


def find_close_match(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` most resembles, or None where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def describe_unknown_name(name: str, known: Iterable[str]) -> str:
    """Say that `name` is unknown, with the nearest known name or, where none is near, all of them."""
    names = sorted(known)
    match = find_close_match(name, names)
    if match:
        return f"unknown; did you mean {match!r}?"
    return f"unknown; known are {', '.join(names)}"
