"""The table of jobs of `finetune synthesize`: what each reads, what it asks, and which rows it makes of the answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.data.formats.row_keys import PROVENANCE
from finetune.data.formats.rows import Row
from finetune.errors import DataError, Place
from finetune.recipe.preparation.synthesize_section import SynthesizeSection
from finetune.rewards.rules import Answer, judge_final_answer
from finetune.synthesis.endpoints.endpoint import Endpoint
from finetune.synthesis.endpoints.questioning import Request, Skip, Written
from finetune.synthesis.prompts import Prompt, list_json
from finetune.synthesis.reading_answers import ask_until_read
from finetune.synthesis.scoring import AnswerToScore, Scored, Scorer, add_answer

Content = dict[str, Any]


@dataclass(frozen=True)
class Seed:
    """A row that something is made of."""

    place: Place
    row: Row

    @property
    def turns(self) -> list[Mapping[str, str]]:
        """The conversation, for a prompt up to the question."""
        return [{"role": turn["role"], "content": turn["content"]} for turn in self.row.messages]


@dataclass(frozen=True)
class JobContext:
    """What a job works with."""

    section: SynthesizeSection
    endpoint: Endpoint
    scorer: Scorer


@dataclass
class Made:
    """The rows made of one seed, and the reasons for what is missing."""

    rows: list[Content] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True)
class JobKind:
    """One job: the kind of rows it needs, the first requests for a seed, and the rows for several seeds.

    `advice` says what helps where it made no row.
    """

    name: str
    needs: Literal["prompt", "text", "conversation"]
    ask: Callable[[SynthesizeSection, Seed], Iterator[Request]]
    make: Callable[[JobContext, Sequence[Seed]], list[Made]]
    advice: str


def _ask_answers(section: SynthesizeSection, seed: Seed) -> Iterator[Request]:
    turns = [(str(turn["role"]), str(turn["content"])) for turn in seed.turns]
    if section.system is not None and turns[0][0] != "system":
        turns = [("system", section.system), *turns]
    for number in range(section.samples):
        yield Request(tuple(turns), section.max_tokens, section.temperature, number)


def _score_answers(
    context: JobContext, seeds: Sequence[Seed]
) -> Iterator[tuple[Seed, list[tuple[Written, Scored]], list[Skip]]]:
    """Yield for each seed its answers with their scores, and the requests without an answer."""
    requests = [request for seed in seeds for request in _ask_answers(context.section, seed)]
    outcomes = list(context.endpoint.ask_all(requests))
    size = context.section.samples
    parts = [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
    answers = [
        AnswerToScore(str(seed.place), seed.turns, outcome, seed.row.answer)
        for seed, part in zip(seeds, parts, strict=True)
        for outcome in part
        if isinstance(outcome, Written)
    ]
    scores = iter(context.scorer.score(answers))
    for seed, part in zip(seeds, parts, strict=True):
        written = [(outcome, next(scores)) for outcome in part if isinstance(outcome, Written)]
        yield seed, written, [outcome for outcome in part if isinstance(outcome, Skip)]


def _make_answers(context: JobContext, seeds: Sequence[Seed]) -> list[Made]:
    return [_keep_answers(context, *found) for found in _score_answers(context, seeds)]


def _keep_answers(
    context: JobContext, seed: Seed, answers: Sequence[tuple[Written, Scored]], skips: list[Skip]
) -> Made:
    made, section = Made(skips=list(skips)), context.section
    kept = []
    for written, scored in answers:
        if not written.text.strip():
            made.skips.append(Skip("empty answer", ""))
        elif section.keep == "verified" and not _is_true(seed, written):
            made.skips.append(Skip("not verified", written.text[-80:]))
        elif section.keep == "best" and scored.score is None:
            made.skips.append(Skip("no score", written.text[:80]))
        else:
            kept.append((written, scored))
    if section.keep == "best" and kept:
        best = max(kept, key=lambda item: item[1].score or 0.0)
        made.skips += [Skip("not the best", "")] * (len(kept) - 1)
        kept = [best]
    for written, scored in kept:
        row: Content = {"messages": add_answer(seed.turns, written.text)}
        made.rows.append(_sign(context, seed, row, scores=dict(scored.parts)))
    return made


def _is_true(seed: Seed, written: Written) -> bool:
    return seed.row.answer is not None and bool(judge_final_answer(Answer("", written.text, seed.row.answer)))


def _make_pairs(context: JobContext, seeds: Sequence[Seed]) -> list[Made]:
    found = []
    for seed, answers, skips in _score_answers(context, seeds):
        made = Made(skips=list(skips))
        scored = [
            (float(own.score), written.text)
            for written, own in answers
            if own.score is not None and written.text.strip()
        ]
        best, worst = (
            max(scored, default=None, key=lambda item: item[0]),
            min(scored, default=None, key=lambda item: item[0]),
        )
        if best is None or worst is None:
            made.skips.append(Skip("no answers with a score", ""))
        elif best[0] - worst[0] <= context.section.margin or best[1] == worst[1]:
            made.skips.append(Skip("tie", f"{best[0]:.4g} and {worst[0]:.4g}"))
        else:
            row: Content = {"prompt": seed.turns}
            for key, (_, text) in (("chosen", best), ("rejected", worst)):
                row[key] = [{"role": "assistant", "content": text}]
            made.rows.append(_sign(context, seed, row, scores={"chosen": best[0], "rejected": worst[0]}))
        found.append(made)
    return found


def _sign(context: JobContext, seed: Seed, row: Content, **more: Any) -> Content:
    """Return a row that says where it comes from."""
    origin = {"file": seed.place.file, seed.place.unit: seed.place.line}
    source = {"job": context.section.job, "model": context.endpoint.model_name, "from": origin}
    return {**row, PROVENANCE: {**source, **{key: value for key, value in more.items() if value}}}


def _ask_questions(section: SynthesizeSection, seed: Seed, attempt: int = 0) -> Iterator[Request]:
    prompt = Prompt("synthesis", "questions").render(text=seed.row.text, count=section.samples)
    yield Request((("user", prompt),), section.max_tokens, section.temperature, attempt)


def _make_questions(context: JobContext, seeds: Sequence[Seed]) -> list[Made]:
    section = context.section
    found = ask_until_read(
        context.endpoint,
        len(seeds),
        lambda number, attempt: next(_ask_questions(section, seeds[number], attempt)),
        lambda _, text: _read_list(text),
        section.attempts,
    )
    return [_keep_questions(context, seed, value) for seed, value in zip(seeds, found, strict=True)]


def _keep_questions(context: JobContext, seed: Seed, found: list[Content] | Skip) -> Made:
    """Keep the pairs whose quote stands in the text, so that the answer is grounded in it."""
    if isinstance(found, Skip):
        return Made(skips=[found])
    made = Made()
    for item in found[: context.section.samples]:
        quote = item.get("quote") or ""
        place = seed.row.text.find(quote) if isinstance(quote, str) and quote.strip() else -1
        if place < 0:
            made.skips.append(Skip("quote not in the text", str(quote)[:80]))
            continue
        made.rows.append(_sign(context, seed, _make_turns(item), quote=quote, characters=[place, place + len(quote)]))
    return made


def _ask_variations(section: SynthesizeSection, seed: Seed, attempt: int = 0) -> Iterator[Request]:
    question, answer = seed.turns[-2]["content"], seed.turns[-1]["content"]
    for name in section.variations:
        prompt = Prompt("synthesis", name).render(question=question, answer=answer)
        yield Request((("user", prompt),), section.max_tokens, section.temperature, attempt)


def _make_variations(context: JobContext, seeds: Sequence[Seed]) -> list[Made]:
    section = context.section
    size = len(section.variations)
    found = ask_until_read(
        context.endpoint,
        len(seeds) * size,
        lambda number, attempt: list(_ask_variations(section, seeds[number // size], attempt))[number % size],
        lambda _, text: _read_question(text),
        section.attempts,
    )
    result = [Made() for _ in seeds]
    for number, value in enumerate(found):
        made, seed = result[number // size], seeds[number // size]
        if isinstance(value, Skip):
            made.skips.append(value)
        else:
            made.rows.append(_sign(context, seed, _make_turns(value), variation=section.variations[number % size]))
    return result


def _read_list(text: str) -> list[Content] | None:
    for value in list_json(text):
        items = value if isinstance(value, list) else [value]
        if items and all(_is_question(item) for item in items):
            return items
    return None


def _read_question(text: str) -> Content | None:
    return next((value for value in list_json(text) if _is_question(value)), None)


def _is_question(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text := value.get(key), str) and text.strip() for key in ("question", "answer")
    )


def _make_turns(item: Content) -> Content:
    turns = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
    return {"messages": turns}


def read_seed(kind: JobKind, place: Place, row: Row) -> Seed:
    """Return a row as a job takes it.

    Raises:
        DataError: it is a row of another kind.
    """
    if kind.needs == "text" and not row.text:
        raise DataError("is no plain text, which questions are made of; give rows with the key text", place)
    if kind.needs == "conversation" and (len(row.messages) < 2 or row.messages[-1]["role"] != "assistant"):
        raise DataError("is no question with an answer, which variations are made of", place)
    return Seed(place, row)


_PAIRS_ADVICE = (
    "raise synthesize.samples or synthesize.temperature, so that answers differ more, lower synthesize.margin, or score them by other "
    "synthesize.rules"
)
_READING_ADVICE = "raise synthesize.attempts or synthesize.max_tokens, or take a stronger model"
JOBS: Mapping[str, JobKind] = {
    kind.name: kind
    for kind in (
        JobKind(
            "answers",
            "prompt",
            _ask_answers,
            _make_answers,
            "raise synthesize.samples, or set synthesize.keep to another word",
        ),
        JobKind("pairs", "prompt", _ask_answers, _make_pairs, _PAIRS_ADVICE),
        JobKind("questions", "text", _ask_questions, _make_questions, _READING_ADVICE),
        JobKind("variations", "conversation", _ask_variations, _make_variations, _READING_ADVICE),
    )
}
