"""Write the report of `lint` as text."""

from collections.abc import Iterator

from finetune.data.lint.findings import KINDS, Finding, LintReport
from finetune.errors import describe_count


def describe_lint(report: LintReport) -> str:
    """Return the report for a terminal: the gravest kinds first, then the shares of tokens."""
    lines = [
        f"{describe_count(report.rows, 'row')}, {describe_count(report.tokens, 'token')} ({report.trained_tokens:,} trained)"
    ]
    lines += ["", *report.notes] if report.notes else []
    for finding in report.findings:
        lines += ["", *_describe_finding(finding)]
    if not report.findings:
        lines += ["", "nothing found"]
    for title, tokens in (("source", report.sources), ("language", report.languages)):
        lines += ["", f"share of tokens by {title}"]
        lines += [f"  {count / max(1, report.tokens):>6.1%}  {name}" for name, count in tokens.items()]
    return "\n".join(lines)


def _describe_finding(finding: Finding) -> Iterator[str]:
    rows = describe_count(finding.count, "row")
    fix = " (left out by --fix)" if finding.is_dropped else ""
    yield f"{finding.severity} {finding.kind}, {rows}: {KINDS[finding.kind].meaning}{fix}"
    for example in finding.examples:
        place = example.file if example.line is None else f"{example.file}:{example.line}"
        yield f"  {place}  {example.text}"
    if finding.count > len(finding.examples):
        yield f"  … and {finding.count - len(finding.examples):,} more"


def describe_fix(report: LintReport) -> str:
    """Return how many rows were written, and why the others were left out."""
    reasons = ", ".join(f"{count:,} {kind}" for kind, count in report.left_out.items())
    return f"wrote {report.passed:,} of {describe_count(report.rows, 'row')}" + (
        f" (left out: {reasons})" if reasons else ""
    )
