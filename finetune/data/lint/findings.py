"""The kinds of findings, and what `lint` takes in and reports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetune.data.formats.messages import Message
from finetune.data.formats.rows import Row
from finetune.data.languages import MAIN_SHARE, SECOND_SHARE
from finetune.errors import Place

Severity = Literal["error", "warning", "note"]
Split = Literal["train", "evaluation"]


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `--fix` leaves its rows out where `is_dropped` is set."""

    name: str
    severity: Severity
    is_dropped: bool
    meaning: str


# The gravest kinds come first; the report lists findings in this order.
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("unreadable", "error", True, "cannot be read"),
        Kind("role_order", "error", True, "turns out of order"),
        Kind("empty_text", "error", True, "a question or an answer without text"),
        Kind("equal_answers", "error", True, "chosen and rejected answers that are the same"),
        Kind("too_long", "error", True, "longer than data.max_tokens"),
        Kind("overlap", "error", True, "trained, and evaluated on as well"),
        Kind("near_overlap", "error", True, "trained, and nearly the same as a row that is evaluated on"),
        Kind("duplicate", "warning", True, "the same as an earlier row"),
        Kind(
            "other_context",
            "warning",
            False,
            "nearly the text of a row that is evaluated on, with another system message, tools or marks",
        ),
        Kind("near_duplicate", "warning", False, "nearly the same as an earlier row"),
        Kind("mojibake", "warning", False, "text in a wrong encoding, or with lost characters"),
        Kind("control_token", "warning", False, "text that spells a control token"),
        Kind("other_language", "warning", False, "answers in another language than their question"),
        Kind("mixed_scripts", "note", False, "answers that change scripts within themselves"),
        Kind("repeated_punctuation", "note", False, "answers that repeat punctuation"),
        Kind("one_word", "note", False, "answers of a single word"),
    )
}


@dataclass(frozen=True)
class LintRow:
    """One row as it was read, or `fault`: the kind of finding and its text for a row without messages and tokens.

    `messages` ends with the answer, for a pair with the chosen one; `rejected` holds the other answer of a pair. Plain text is
    one message of the assistant. `raw` is the row as it stands in its file, `row` as it is trained, without the recipe's system line.
    """

    place: Place
    split: Split
    messages: Sequence[Message] = ()
    rejected: Sequence[Message] | None = None
    tokens: int = 0
    trained_tokens: int = 0
    raw: Mapping[str, Any] | None = None
    row: Row = field(default_factory=Row)
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class Thresholds:
    """From where on a row has a finding, by the kinds that have a threshold.

    `too_long` is the longest row in tokens, None for `data.max_tokens`. `mojibake` is the fewest places with wrong text in a row,
    `repeated_punctuation` the fewest equal marks in a row, and `one_word` the most words of an answer. `other_language` is the share
    of a text by which one script is its language, and `mixed_scripts` the share of an answer that a second script has.
    """

    too_long: int | None = None
    mojibake: int = 1
    other_language: float = MAIN_SHARE
    mixed_scripts: float = SECOND_SHARE
    repeated_punctuation: int = 4
    one_word: int = 1


@dataclass(frozen=True)
class LintSettings:
    """The longest row in tokens, the spellings of the tokenizer's control tokens, the kinds that `--fix` leaves out, and thresholds."""

    max_tokens: int
    control_tokens: tuple[str, ...] = ()
    dropped: frozenset[str] = frozenset(name for name, kind in KINDS.items() if kind.is_dropped)
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True)
class Example:
    """The place of a finding, and a shortened text. `line` is None where the whole file is meant."""

    file: str
    line: int | None
    text: str


@dataclass
class Finding:
    """All findings of one kind: the number of rows, and the first three rows as examples."""

    kind: str
    severity: Severity
    is_dropped: bool
    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class LintReport:
    """The numbers of all rows: `rows` = `passed` + the sum of `left_out`.

    `left_out` counts each row once, under the first of its kinds in the order of `KINDS`. `tokens`, `trained_tokens`, `sources`
    (by file) and `languages` count tokens, those of rows that are left out included. `notes` are sentences about the files and
    keys that are not used.
    """

    rows: int
    passed: int
    left_out: dict[str, int]
    findings: list[Finding]
    tokens: int
    trained_tokens: int
    sources: dict[str, int]
    languages: dict[str, int]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; each finding also holds the file, line and text of its first example."""
        report = asdict(self)
        report["findings"] = [{**finding, **finding["examples"][0]} for finding in report["findings"]]
        report["counts"] = {finding.kind: finding.count for finding in self.findings}
        return report
