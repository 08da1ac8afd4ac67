"""Read the answers that a run keeps: to the fixed prompts as they change over the run, and the newest ones of an online method."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.files.json_files import explain_damage, read_json, read_lines
from finetune.files.terminal import escape_controls
from finetune.runs.run_files import ANSWERS_FILE, COMPLETIONS_FILE, EVALUATED_ANSWERS_FILE, describe_origin

_MOST_COMPLETIONS = 8
_MOST_LETTERS = 4000
# What the page shows of one prompt's course, so that a report stays below 2 MB.
_MOST_STRETCHES, _STRETCH_LETTERS = 24, 600


@dataclass(frozen=True)
class Stretch:
    """One answer, and the first and the last step of the evaluations in a row that gave it.

    `like` is "before" or "after" where it is that answer; the page then does not repeat the text.
    """

    first: int
    last: int
    text: str
    like: str = ""


@dataclass(frozen=True)
class Answer:
    """A prompt with the answers before and after the training; `after` is None while the run trains, `before` where it is not known.

    `course` holds the answers at the evaluations, equal ones in a row as one, and `unshown` counts those that are too many for the
    page.
    """

    origin: str
    prompt: str
    before: str | None
    after: str | None
    course: tuple[Stretch, ...] = ()
    unshown: int = 0


def read_answers(folder: Path) -> Iterator[Answer]:
    """Yield the fixed prompts of a run with their answers."""
    lines = [line for _, line in read_lines(folder / EVALUATED_ANSWERS_FILE)]
    samples = read_json(folder / ANSWERS_FILE) or ()
    with explain_damage(folder / ANSWERS_FILE):
        yield from [_read_answer(sample, lines, number) for number, sample in enumerate(samples)]


def _read_answer(sample: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], number: int) -> Answer:
    """Return one prompt with its answers; `number` is its place among those of the lines."""
    known = {name: str(sample[name]) for name in ("before", "after") if sample.get(name) is not None}
    course = merge_answers(lines, number)
    shown = tuple(_describe(stretch, known) for stretch in spread_out(course, _MOST_STRETCHES))
    origin, prompt = (cut_text(str(sample.get(name, ""))) for name in ("origin", "prompt"))
    before, after = (cut_text(known[name]) if name in known else None for name in ("before", "after"))
    return Answer(describe_origin(origin), prompt, before, after, shown, len(course) - len(shown))


def merge_answers(lines: Sequence[Mapping[str, Any]], number: int) -> list[Stretch]:
    """Return the answers to one prompt by the lines of the evaluations, oldest first, equal ones in a row as one."""
    course: list[Stretch] = []
    for line in lines:
        answers = line.get("answers")
        if not isinstance(answers, list) or number >= len(answers):
            continue
        step, text = line["step"], str(answers[number])
        if course and course[-1].text == text:
            course[-1] = Stretch(course[-1].first, step, text)
        else:
            course.append(Stretch(step, step, text))
    return course


def _describe(stretch: Stretch, known: Mapping[str, str]) -> Stretch:
    """Return a stretch as the page shows it, given the answers before and after."""
    like = next((name for name, text in known.items() if text == stretch.text), "")
    return Stretch(stretch.first, stretch.last, "" if like else cut_text(stretch.text, _STRETCH_LETTERS), like)


def spread_out(course: Sequence[Stretch], most: int) -> list[Stretch]:
    """Return at most so many stretches, spread evenly, with the first and the last."""
    if len(course) <= most:
        return list(course)
    return [course[place * (len(course) - 1) // (most - 1)] for place in range(most)]


def read_completions(folder: Path) -> Iterator[Answer]:
    """Yield the newest answers of an online method with their rewards."""
    for _, line in list(read_lines(folder / COMPLETIONS_FILE))[-_MOST_COMPLETIONS:]:
        rewards = ", ".join(f"{name} {value:.3g}" for name, value in (line.get("rewards") or {}).items())
        origin = f"step {line['step']:,}, {line.get('origin', '')}: {rewards}"
        yield Answer(
            cut_text(origin), cut_text(str(line.get("question", ""))), cut_text(str(line.get("text", ""))), None
        )


def cut_text(text: str, most: int = _MOST_LETTERS) -> str:
    """Return a text with its control characters escaped and at most so many letters."""
    text = escape_controls(text)
    return text if len(text) <= most else f"{text[:most]} …"
