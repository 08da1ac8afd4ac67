"""Check the section `clean` of a recipe, and find the files that it names."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune.check.data_section import describe_places, find_file
from finetune.data.lint.findings import KINDS, Thresholds
from finetune.errors import describe_unknown_name
from finetune.evaluation.tasks.task_names import TASKS
from finetune.recipe.preparation.clean_section import CleanSection, DecontaminateSection

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
# The thresholds that are whole numbers: a single mark is no repetition.
_LEAST, _MOST = {"repeated_punctuation": 2}, 1_000_000


def check_clean(section: CleanSection, folder: Path) -> Iterator[str]:
    """Yield the problems of the section; files are looked for in `folder`, that of the recipe, first."""
    for name in section.rules:
        if name not in RULE_KINDS:
            other = "; it is a step of its own" if name in KINDS else ""
            yield f"clean.rules: {name!r} is {describe_unknown_name(name, RULE_KINDS, 'no rule')}{other}"
    yield from _check_near_duplicates(section)
    yield from _check_thresholds(section)
    yield from _check_decontaminate(section.decontaminate, folder)
    complexity = section.complexity
    if complexity.batch_size < 1:
        yield f"clean.complexity.batch_size: must be at least 1; found {complexity.batch_size}"
    if section.verify.answers and not section.verify.truth:
        yield "clean.verify.truth: must name the key that holds the true answer, such as answer"
    yield from _check_mix(section, folder)


def _check_near_duplicates(section: CleanSection) -> Iterator[str]:
    near = section.near_duplicates
    if near.threshold is not None and not 0 < near.threshold <= 1:
        yield f"clean.near_duplicates.threshold: must be above 0 and at most 1, such as 0.8; found {near.threshold}"
    if near.ngram < 1:
        yield f"clean.near_duplicates.ngram: must be at least 1; found {near.ngram}"
    if not 1 <= near.permutations <= _MOST_SLOTS:
        yield f"clean.near_duplicates.permutations: must lie from 1 to {_MOST_SLOTS}; found {near.permutations}"
    if not near.compare:
        yield f"clean.near_duplicates.compare: names nothing; name at least one of {', '.join(COMPARED)}"
    for name in near.compare:
        if name not in COMPARED:
            yield f"clean.near_duplicates.compare: {name!r} is {describe_unknown_name(name, COMPARED)}"


def _check_thresholds(section: CleanSection) -> Iterator[str]:
    defaults, places = vars(Thresholds()), "clean.thresholds"
    for name, value in vars(section.thresholds).items():
        if value != defaults[name] and name not in section.rules:
            yield f"{places}.{name}: has no effect, because clean.rules does not name {name}; add it there, or remove this key"
        if isinstance(value, float) and not 0 < value <= 1:
            yield f"{places}.{name}: must be a share above 0 and at most 1; found {value}"
        least = _LEAST.get(name, 1)
        if isinstance(value, int) and not least <= value <= _MOST:
            yield f"{places}.{name}: must lie from {least} to {_MOST:,}; found {value}"


def _check_decontaminate(section: DecontaminateSection, folder: Path) -> Iterator[str]:
    for name in section.against:
        if name not in TASKS and find_file(name, folder) is None:
            yield (
                f"clean.decontaminate.against: {name} is no task ({', '.join(TASKS)}), and no such file exists "
                f"({describe_places(folder)})"
            )
    if section.task_data and find_file(section.task_data, folder) is None:
        yield f"clean.decontaminate.task_data: {section.task_data} does not exist ({describe_places(folder)})"
    if section.task_data and not set(section.against) & set(TASKS):
        yield f"clean.decontaminate.task_data: has no effect, because against names no task ({', '.join(TASKS)}); remove this key"
    if section.ngram < 1:
        yield f"clean.decontaminate.ngram: must be at least 1; found {section.ngram}"


def _check_mix(section: CleanSection, folder: Path) -> Iterator[str]:
    mix = section.mix
    if mix.classifier and mix.key:
        yield "clean.mix.classifier: kinds come from clean.mix.key already; remove one of the two"
    if mix.classifier and find_file(mix.classifier, folder) is None:
        yield f"clean.mix.classifier: {mix.classifier} does not exist ({describe_places(folder)}); give a folder"
    if mix.classifier and not mix.shares:
        yield "clean.mix.shares: is missing; give the kinds of clean.mix.classifier their shares"
    for name, share in section.mix.shares.items():
        if share <= 0:
            yield f"clean.mix.shares.{name}: must be above 0; found {share}"
    if section.mix.rows is not None and section.mix.rows < 1:
        yield f"clean.mix.rows: must be at least 1; found {section.mix.rows}"


def settle_clean(section: CleanSection, folder: Path) -> CleanSection:
    """Return the section with absolute paths."""
    decontaminate, mix = section.decontaminate, section.mix
    against = tuple(name if name in TASKS else str(find_file(name, folder)) for name in decontaminate.against)
    task_data = str(find_file(decontaminate.task_data, folder)) if decontaminate.task_data else ""
    decontaminate = replace(decontaminate, against=against, task_data=task_data)
    mix = replace(mix, classifier=str(find_file(mix.classifier, folder))) if mix.classifier else mix
    prompt = find_file(section.judge.prompt, folder) if section.judge.prompt.endswith(".jinja") else None
    judge = section.judge if prompt is None else replace(section.judge, prompt=str(prompt))
    return replace(section, decontaminate=decontaminate, judge=judge, mix=mix)
