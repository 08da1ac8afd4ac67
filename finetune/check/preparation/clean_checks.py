"""Check the section `clean` of a recipe, and find the files that it names."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune.check.data_section import find_file
from finetune.data.lint.findings import KINDS
from finetune.errors import describe_unknown_name
from finetune.recipe.preparation.clean_section import CleanSection

# Kinds that say what one row is by itself. The others are steps of their own.
RULE_KINDS = (
    "equal_answers",
    "too_long",
    "mojibake",
    "control_token",
    "other_language",
    "mixed_scripts",
    "repeated_punctuation",
    "one_word",
)
COMPARED = ("trained", "question")
_MOST_SLOTS = 1024


def check_clean(section: CleanSection, folder: Path) -> Iterator[str]:
    """Yield the problems of the section; files are looked for in `folder`, that of the recipe, first."""
    for name in section.rules:
        if name not in RULE_KINDS:
            other = "; it is a step of its own" if name in KINDS else ""
            yield f"clean.rules: {name!r} is {describe_unknown_name(name, RULE_KINDS, 'no rule')}{other}"
    yield from _check_near_duplicates(section)
    for file in section.decontaminate.against:
        if find_file(file, folder) is None:
            yield f"clean.decontaminate.against: {file} does not exist (looked in {folder.resolve()} and {Path.cwd()})"
    if section.decontaminate.ngram < 1:
        yield f"clean.decontaminate.ngram: must be at least 1; found {section.decontaminate.ngram}"
    complexity = section.complexity
    if complexity.batch_size < 1:
        yield f"clean.complexity.batch_size: must be at least 1; found {complexity.batch_size}"
    if section.verify.answers and not section.verify.truth:
        yield "clean.verify.truth: must name the key that holds the true answer, such as answer"
    yield from _check_mix(section)


def _check_near_duplicates(section: CleanSection) -> Iterator[str]:
    near = section.near_duplicates
    if near.threshold is not None and not 0 < near.threshold <= 1:
        yield f"clean.near_duplicates.threshold: must be above 0 and at most 1, such as 0.8; found {near.threshold}"
    if near.ngram < 1:
        yield f"clean.near_duplicates.ngram: must be at least 1; found {near.ngram}"
    if not 1 <= near.permutations <= _MOST_SLOTS:
        yield f"clean.near_duplicates.permutations: must lie from 1 to {_MOST_SLOTS}; found {near.permutations}"
    for name in near.compare:
        if name not in COMPARED:
            yield f"clean.near_duplicates.compare: {name!r} is {describe_unknown_name(name, COMPARED)}"


def _check_mix(section: CleanSection) -> Iterator[str]:
    for name, share in section.mix.shares.items():
        if share <= 0:
            yield f"clean.mix.shares.{name}: must be above 0; found {share}"
    if section.mix.rows is not None and section.mix.rows < 1:
        yield f"clean.mix.rows: must be at least 1; found {section.mix.rows}"


def settle_clean(section: CleanSection, folder: Path) -> CleanSection:
    """Return the section with absolute paths."""
    against = tuple(str(find_file(file, folder)) for file in section.decontaminate.against)
    prompt = find_file(section.judge.prompt, folder) if section.judge.prompt.endswith(".jinja") else None
    judge = section.judge if prompt is None else replace(section.judge, prompt=str(prompt))
    return replace(section, decontaminate=replace(section.decontaminate, against=against), judge=judge)
