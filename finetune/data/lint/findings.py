"""One pass over all rows that finds what is wrong with the data, before it is wrong with the model.

Texts are not kept: of each row stay a hash, a MinHash signature and its place, less than 3 KB.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetune.data.formats.messages import Message
from finetune.data.languages import describe_language_change, describe_mixture, name_language
from finetune.data.lint.near_duplicates import NearIndex, sign_text
from finetune.data.lint.text_checks import (
    describe_control_token,
    describe_equal_answers,
    describe_mojibake,
    describe_repeated_punctuation,
    describe_short_answer,
    shorten,
)

Severity = Literal["error", "warning", "note"]
Split = Literal["train", "evaluation"]
_MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Kind:
    """One kind of finding; `is_dropped` says that `--fix` leaves such rows out."""

    name: str
    severity: Severity
    is_dropped: bool
    meaning: str


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
    """One row as it was read; where `fault` names a kind of finding, there are no messages and no tokens.

    `where` is `file, line 18`. `rejected` holds the messages that stand in place of the last of `messages` in a preference row.
    Plain text is one message of the assistant's.
    """

    where: str
    source: str
    split: Split
    messages: Sequence[Message] = ()
    rejected: Sequence[Message] | None = None
    tokens: int = 0
    trained_tokens: int = 0
    raw: Mapping[str, Any] | None = None
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class LintSettings:
    """The limit in tokens, and the spellings of the tokenizer's control tokens."""

    max_tokens: int
    control_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """Where a finding was made, and a shortened text."""

    file: str
    line: int | None
    text: str


@dataclass
class Finding:
    """All rows of one kind of finding: how many, and the first three."""

    kind: str
    severity: Severity
    is_dropped: bool
    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class LintReport:
    """The account of all rows: `rows` = `passed` + `left_out`; tokens are counted before anything is left out.

    `left_out` counts a row once, under the first of its kinds in the order of `KINDS`. `sources` and `languages` hold tokens.
    """

    rows: int
    passed: int
    left_out: dict[str, int]
    findings: list[Finding]
    tokens: int
    trained_tokens: int
    sources: dict[str, int]
    languages: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; each finding also holds the file, line and text of its first example."""
        report = asdict(self)
        report["findings"] = [{**finding, **finding["examples"][0]} for finding in report["findings"]]
        report["counts"] = {finding.kind: finding.count for finding in self.findings}
        return report


@dataclass
class _Seen:
    """What is remembered of one split's rows."""

    places: dict[bytes, str] = field(default_factory=dict)
    near: NearIndex = field(default_factory=NearIndex)


@dataclass
class _Tally:
    rows: int = 0
    passed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)


def lint_rows(
    rows: Iterable[LintRow], settings: LintSettings, keep: Callable[[LintRow], None] | None = None
) -> LintReport:
    """Look at every row once and report; `keep` is called with each row that `--fix` would keep.

    The rows that are evaluated on must come first, so that training rows can be compared with them.
    """
    seen: dict[Split, _Seen] = {"evaluation": _Seen(), "train": _Seen()}
    tally = _Tally()
    for row in rows:
        found = dict([row.fault] if row.fault else [*_check_row(row, settings), *_compare_row(row, seen)])
        _count_row(tally, row, found)
        reason = next((name for name, kind in KINDS.items() if kind.is_dropped and name in found), None)
        if reason is not None:
            tally.left_out[reason] = tally.left_out.get(reason, 0) + 1
            continue
        tally.passed += 1
        if keep is not None:
            keep(row)
    return LintReport(
        rows=tally.rows,
        passed=tally.passed,
        left_out=tally.left_out,
        findings=[tally.findings[name] for name in KINDS if name in tally.findings],
        tokens=tally.tokens,
        trained_tokens=tally.trained_tokens,
        sources=tally.sources,
        languages=dict(sorted(tally.languages.items(), key=lambda item: -item[1])),
    )


def _check_row(row: LintRow, settings: LintSettings) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of what is wrong with a row by itself."""
    texts = [*row.messages, *(row.rejected or ())]
    question = "\n".join(message["content"] for message in row.messages if message["role"] == "user")
    answer = "\n".join(message["content"] for message in row.messages if message["role"] == "assistant")
    checks = {
        "equal_answers": describe_equal_answers(row.messages, row.rejected) if row.rejected else None,
        "too_long": f"{row.tokens:,} tokens" if row.tokens > settings.max_tokens else None,
        "mojibake": describe_mojibake(texts),
        "control_token": describe_control_token(texts, settings.control_tokens),
        "other_language": describe_language_change(question, answer),
        "mixed_scripts": describe_mixture(question, answer),
        "repeated_punctuation": describe_repeated_punctuation(row.messages),
        "one_word": describe_short_answer(row.messages),
    }
    for kind, text in checks.items():
        if text is not None:
            is_about_row = kind in ("too_long", "other_language", "mixed_scripts")
            yield kind, f"{text}: {shorten(answer or question)}" if is_about_row else text


def _compare_row(row: LintRow, seen: Mapping[Split, _Seen]) -> Iterator[tuple[str, str]]:
    """Yield what a row shares with earlier ones, and remember it. System lines are left out: many rows share one."""
    spoken = [message["content"] for message in row.messages if message["role"] != "system"]
    rejected = [message["content"] for message in row.rejected or ()]
    digest = hashlib.blake2b(json.dumps([spoken, rejected]).encode(), digest_size=16).digest()
    text = "\n".join([*spoken, *rejected])
    shown = shorten(text)
    is_trained = row.split == "train"
    signature = sign_text(text)
    if is_trained and (place := seen["evaluation"].places.get(digest)):
        yield "overlap", f"the same as {_name_place(place, row)}: {shown}"
    elif is_trained and signature and (near := seen["evaluation"].near.find(signature)):
        yield "near_overlap", f"{near[1]:.0%} the same as {_name_place(near[0], row)}: {shown}"
    own = seen[row.split]
    if place := own.places.get(digest):
        yield "duplicate", f"the same as {_name_place(place, row)}: {shown}"
        return
    own.places[digest] = row.where
    if signature is None:
        return
    if near := own.near.find(signature):
        yield "near_duplicate", f"{near[1]:.0%} the same as {_name_place(near[0], row)}: {shown}"
        if is_trained:  # thousands of copies of one row are each compared with the first only
            return
    own.near.add(row.where, signature)


def _name_place(place: str, row: LintRow) -> str:
    return place.removeprefix(f"{row.source}, ")


def _count_row(tally: _Tally, row: LintRow, found: Mapping[str, str]) -> None:
    tally.rows += 1
    tally.tokens += row.tokens
    tally.trained_tokens += row.trained_tokens
    tally.sources[row.source] = tally.sources.get(row.source, 0) + row.tokens
    if row.messages:
        text = "\n".join(message["content"] for message in row.messages if message["role"] != "system")
        language = name_language(text)
        tally.languages[language] = tally.languages.get(language, 0) + row.tokens
    for name, text in found.items():
        kind = KINDS[name]
        finding = tally.findings.setdefault(name, Finding(name, kind.severity, kind.is_dropped))
        finding.count += 1
        if len(finding.examples) < _MOST_EXAMPLES:
            finding.examples.append(_make_example(row.where, text))


def _make_example(where: str, text: str) -> Example:
    file, _, place = where.rpartition(", ")
    number = place.rpartition(" ")[2]
    return Example(file, int(number), text) if file and number.isdecimal() else Example(where, None, text)


def describe_lint(report: LintReport) -> str:
    """Return the report for a terminal: the gravest kinds first, then where the tokens are."""
    lines = [f"{report.rows:,} rows, {report.tokens:,} tokens ({report.trained_tokens:,} trained)"]
    for finding in report.findings:
        rows = "1 row" if finding.count == 1 else f"{finding.count:,} rows"
        fix = " (left out by --fix)" if finding.is_dropped else ""
        lines += ["", f"{finding.severity} {finding.kind}, {rows}: {KINDS[finding.kind].meaning}{fix}"]
        for example in finding.examples:
            place = example.file if example.line is None else f"{example.file}:{example.line}"
            lines.append(f"  {place}  {example.text}")
        if finding.count > len(finding.examples):
            lines.append(f"  … and {finding.count - len(finding.examples):,} more")
    if not report.findings:
        lines += ["", "nothing found"]
    for title, tokens in (("source", report.sources), ("language", report.languages)):
        lines += ["", f"share of tokens by {title}"]
        lines += [f"  {count / max(1, report.tokens):>6.1%}  {name}" for name, count in tokens.items()]
    return "\n".join(lines)


def describe_fix(report: LintReport) -> str:
    """Say how many rows were written, and why the others were not."""
    reasons = ", ".join(f"{count:,} {kind}" for kind, count in report.left_out.items())
    return f"wrote {report.passed:,} of {report.rows:,} rows" + (f" (left out: {reasons})" if reasons else "")
