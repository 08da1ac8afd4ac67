"""The errors that the user can fix.

    FinetuneError           any of those below; the command line prints it without a traceback and exits with 2
    ├── RecipeError         a recipe with one or more problems
    ├── CheckpointError     a base checkpoint that cannot be found, read or folded
    ├── HubError            something that cannot be fetched from the hub, or sent to it
    ├── DataError           a data file or row that cannot be used
    ├── TemplateError       a chat template that cannot be used
    ├── TrainingError       a run that must not start, or cannot be resumed
    ├── ExportError         an adapter that does not fit its base, or an export that failed its comparison
    ├── EndpointError       a model on a server that cannot be asked, or a limit that is reached
    ├── OutputError         a folder that cannot be written: not empty, no permission, no space
    ├── MachineError        something this machine cannot do
    └── ArgumentError       an argument of a public function that has a wrong type or lies outside its range

Every message says what is wrong, where, what was found, what would be right, and what to do.
Any other exception is a bug of the kit and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# The kinds of findings with which `finetune lint` reports rows that cannot be read.
FaultKind = Literal["unreadable", "role_order", "empty_text"]


class FinetuneError(Exception):
    """The user's input cannot be used as it is; the message says why and what to do."""


class RecipeError(FinetuneError):
    """A recipe has problems; `problems` holds one sentence for each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        count = describe_count(len(problems), "problem")
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))


class CheckpointError(FinetuneError):
    """A checkpoint cannot be found, read or folded."""


class HubError(FinetuneError):
    """The hub, the network or the hub's cache does not do what was asked.

    `is_unreachable`: the hub said nothing about it, so that a copy on this machine can stand in.
    """

    def __init__(self, fault: str, *, is_unreachable: bool = False) -> None:
        self.is_unreachable = is_unreachable
        super().__init__(fault)


@dataclass(frozen=True)
class Place:
    """A place in a data file or in a data set of the hub: a line, a row, or the whole file where `line` is None.

    Lines and rows are counted from 1. Text files have lines; `unit="row"` is for files without lines and for JSON lists.
    """

    file: str
    line: int | None = None
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        """Return the place for a person, such as `data/my.jsonl, line 18`."""
        return self.file if self.line is None else f"{self.file}, {self.position}"

    @property
    def position(self) -> str:
        """The place within its file, such as `line 18`."""
        return f"{self.unit} {self.line}"


class DataError(FinetuneError):
    """A data file or one of its rows cannot be used.

    The message is `<place>: <fault>`. `place` is None where the message is about no single file or row. `kind` is the kind of
    finding with which `finetune lint` reports it.
    """

    def __init__(self, fault: str, place: Place | None = None, kind: FaultKind = "unreadable") -> None:
        self.fault = fault
        self.place = place
        self.kind = kind
        super().__init__(fault if place is None else f"{place}: {fault}")


class TemplateError(FinetuneError):
    """A chat template cannot be used for training."""


class TrainingError(FinetuneError):
    """A run must not start, or cannot be resumed."""


class ExportError(FinetuneError):
    """A model cannot be exported, or the export is not equal to what was trained."""


class EndpointError(FinetuneError):
    """A model on a server cannot be asked, or a limit of its endpoint is reached."""


class OutputError(FinetuneError):
    """An output file or folder cannot be written."""


class MachineError(FinetuneError):
    """This machine cannot do what was asked."""


class ArgumentError(FinetuneError):
    """An argument of a public function has a wrong type, or lies outside its range."""


def describe_count(count: int, one: str, many: str = "") -> str:
    """Return a number with what it counts, such as `1 row` and `2,000 rows`; `many` is for words that take no s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def find_close_match(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` resembles most, or None where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def describe_unknown_name(name: str, known: Iterable[str], unknown: str = "unknown") -> str:
    """Return a text that says that a name is unknown, with the closest known name or, where none is close, all of them.

    `unknown` is the beginning of the text.
    """
    names = sorted(known)
    match = find_close_match(name, names)
    if match:
        return f"{unknown}; did you mean {match!r}?"
    return f"{unknown}; known are {', '.join(names)}"
