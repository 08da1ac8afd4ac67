"""Look at every row once, and find what is wrong with it by itself or beside earlier rows.

Texts are not kept. Of each row a hash, a MinHash signature and its place are kept, less than 3 KB.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

from finetune.data.formats.row_keys import describe_remarks, describe_unused
from finetune.data.formats.rows import Row, hash_row
from finetune.data.languages import describe_language_change, describe_mixture, name_language
from finetune.data.lint.findings import KINDS, Example, Finding, LintReport, LintRow, LintSettings, Split
from finetune.data.lint.near_duplicates import NearIndex, sign_text
from finetune.data.lint.text_checks import (
    describe_control_token,
    describe_equal_answers,
    describe_mojibake,
    describe_repeated_punctuation,
    describe_short_answer,
    shorten,
)
from finetune.errors import Place, describe_count

_MOST_EXAMPLES = 3
# The texts of these findings show the row, because they do not quote it themselves.
_SHOWING_ROW = ("too_long", "other_language", "mixed_scripts")


@dataclass
class _Seen:
    """What is kept of the rows of one split: their places by hash, and their signatures."""

    places: dict[bytes, Place] = field(default_factory=dict)
    near: NearIndex = field(default_factory=NearIndex)


@dataclass
class _Tally:
    """The numbers of a `LintReport` while they are counted."""

    rows: int = 0
    passed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def count_row(self, row: LintRow, found: Mapping[str, str], dropped: Set[str]) -> None:
        """Add a row; `found` maps its kinds of findings to their texts, `dropped` are the kinds that `--fix` leaves out."""
        self.rows += 1
        self.unused.update(row.row.unused)
        self.remarks.update(row.row.remarks)
        self.tokens += row.tokens
        self.trained_tokens += row.trained_tokens
        self.sources[row.place.file] = self.sources.get(row.place.file, 0) + row.tokens
        if row.messages:
            text = "\n".join(message["content"] for message in row.messages if message["role"] != "system")
            language = name_language(text)
            self.languages[language] = self.languages.get(language, 0) + row.tokens
        for name, text in found.items():
            finding = self.findings.setdefault(name, Finding(name, KINDS[name].severity, name in dropped))
            finding.count += 1
            if len(finding.examples) < _MOST_EXAMPLES:
                finding.examples.append(Example(row.place.file, row.place.line, text))

    def make_report(self) -> LintReport:
        """Return the report: findings in the order of `KINDS`, languages by their tokens."""
        return LintReport(
            rows=self.rows,
            passed=self.passed,
            left_out=self.left_out,
            findings=[self.findings[name] for name in KINDS if name in self.findings],
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            sources=self.sources,
            languages=dict(sorted(self.languages.items(), key=lambda item: -item[1])),
            notes=(*describe_unused(self.unused), *describe_remarks(self.remarks)),
        )


def lint_rows(
    rows: Iterable[LintRow], settings: LintSettings, keep: Callable[[LintRow], None] | None = None
) -> LintReport:
    """Look at every row once and return the report; call `keep` with each row that `--fix` keeps.

    The rows for evaluation must come first, so that training rows are compared with them.
    """
    seen: dict[Split, _Seen] = {"evaluation": _Seen(), "train": _Seen()}
    tally = _Tally()
    for row in rows:
        found = dict([row.fault] if row.fault else [*check_row_text(row, settings), *_compare_row(row, seen)])
        tally.count_row(row, found, settings.dropped)
        reason = _find_reason(row, found, settings.dropped)
        if reason is not None:
            tally.left_out[reason] = tally.left_out.get(reason, 0) + 1
            continue
        tally.passed += 1
        if keep is not None:
            keep(row)
    return tally.make_report()


def _find_reason(row: LintRow, found: Mapping[str, str], dropped: Set[str]) -> str | None:
    """Return the gravest kind of finding for which a row is left out. What could not be read as a row cannot be written either."""
    if row.raw is None and row.fault is not None:
        return row.fault[0]
    return next((name for name in KINDS if name in found and name in dropped), None)


def check_row_text(row: LintRow, settings: LintSettings) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of what is wrong with a row by itself."""
    texts = [*row.messages, *(row.rejected or ())]
    question = "\n".join(message["content"] for message in row.messages if message["role"] == "user")
    answer = "\n".join(message["content"] for message in row.messages if message["role"] == "assistant")
    thresholds = settings.thresholds
    longest = settings.max_tokens if thresholds.too_long is None else thresholds.too_long
    checks = {
        "equal_answers": describe_equal_answers(row.messages, row.rejected) if row.rejected else None,
        "too_long": describe_count(row.tokens, "token") if row.tokens > longest else None,
        "mojibake": describe_mojibake(texts, thresholds.mojibake),
        "control_token": describe_control_token(texts, settings.control_tokens),
        "other_language": describe_language_change(question, answer, thresholds.other_language),
        "mixed_scripts": describe_mixture(question, answer, thresholds.mixed_scripts),
        "repeated_punctuation": describe_repeated_punctuation(row.messages, thresholds.repeated_punctuation),
        "one_word": describe_short_answer(row.messages, thresholds.one_word),
    }
    for kind, text in checks.items():
        if text is not None:
            yield kind, f"{text}: {shorten(answer or question)}" if kind in _SHOWING_ROW else text


def _compare_row(row: LintRow, seen: Mapping[Split, _Seen]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of what a row shares with earlier rows, and remember the row.

    Equal rows are asked and trained the same, as for `data.deduplicate`. Rows are nearly the same by their texts alone, without
    system messages, because many rows share one.
    """
    spoken = [message["content"] for message in row.messages if message["role"] != "system"]
    rejected = [message["content"] for message in row.rejected or ()]
    digest, context = hash_row(row.row), _hash_context(row.row)
    text = "\n".join([*spoken, *rejected])
    shown = shorten(text)
    is_trained = row.split == "train"
    signature = sign_text(text)
    if is_trained and (place := seen["evaluation"].places.get(digest)):
        yield "overlap", f"the same as {_name_place(place, row)}: {shown}"
    elif is_trained and signature:
        near_rows = seen["evaluation"].near
        if near := near_rows.find(signature, context):
            yield "near_overlap", f"{near[1]:.0%} the same as {_name_place(near[0], row)}: {shown}"
        elif near := near_rows.find(signature):
            yield "other_context", f"{near[1]:.0%} the same as {_name_place(near[0], row)}: {shown}"
    own = seen[row.split]
    if place := own.places.get(digest):
        yield "duplicate", f"the same as {_name_place(place, row)}: {shown}"
        return
    own.places[digest] = row.place
    if signature is None:
        return
    if near := own.near.find(signature):
        yield "near_duplicate", f"{near[1]:.0%} the same as {_name_place(near[0], row)}: {shown}"
        if is_trained:  # thousands of copies of one row are each compared with the first only
            return
    own.near.add(row.place, signature, context)


def _hash_context(row: Row) -> bytes:
    """Return a hash of all that a row holds beside the texts that are spoken."""
    parts = [*row.messages, *row.chosen, *row.rejected]
    texts = [message["content"] for message in parts if message["role"] == "system"]
    others = [{key: message[key] for key in message if key not in ("role", "content")} for message in parts]
    numbered = [{"number": number, **other} for number, other in enumerate(others) if other]
    bare = replace(row, messages=numbered, chosen=[], rejected=[], text="", token_ids=[])
    return hashlib.blake2b(repr((texts, bare)).encode(errors="surrogatepass"), digest_size=16).digest()


def _name_place(place: Place, row: LintRow) -> str:
    """Return the place of an earlier row, without its file where it is the file of `row`."""
    return place.position if place.file == row.place.file else str(place)
