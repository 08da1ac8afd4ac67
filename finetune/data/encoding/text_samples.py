"""Keep a few rows with their texts, and encode them anew: a tokenizer that is read again must give the tokens that were trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from finetune.data.encoding.rendering import ChatTemplate, render_conversations, render_prompt
from finetune.data.encoding.row_encoder import RowEncoder, SourceRow, TokenRow, list_sides
from finetune.data.encoding.spellings import compile_spellings, list_control_spellings
from finetune.data.formats.rows import Row, TextSample
from finetune.data.settings import DataSettings
from finetune.errors import Place, describe_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES_OF_A_KIND, _SAMPLE_TOKENS = 16, 1024
# A row that is longer as JSON is left out: all samples are a few files of text beside gigabytes of weights.
_LONGEST_SAMPLE = 100_000


class SampleCollector:
    """Keeps the first rows of every kind while rows stream by."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._kept: list[tuple[int, TextSample]] = []
        self._counts: Counter[str] = Counter()

    def watch(self, batches: Iterable[list[TokenRow]]) -> Iterator[list[TokenRow]]:
        """Yield batches of rows as they come, as they were encoded, before any is cut."""
        for batch in batches:
            self._add(batch)
            yield batch

    def _add(self, rows: Sequence[TokenRow]) -> None:
        for number, group in groupby(rows, key=lambda row: row.source.number):
            made = list(group)
            kind = made[0].source.kind
            if kind == "tokens" or self._counts[kind] >= _SAMPLES_OF_A_KIND or self._is_dropped(made):
                continue
            content = _describe_row(made[0].source.row)
            if content is not None:
                self._counts[kind] += 1
                ids = [side[:_SAMPLE_TOKENS] for row in made for side in row.sides]
                self._kept.append((number, TextSample(kind, self._settings.shape, content, ids)))

    def _is_dropped(self, rows: Sequence[TokenRow]) -> bool:
        limit = self._settings.max_tokens
        return self._settings.overflow == "drop" and any(row.full_length > limit for row in rows)

    def choose(self, held: Container[int]) -> tuple[TextSample, ...]:
        """Return the samples that are trained, or those that are held out where these are all."""
        trained = tuple(sample for number, sample in self._kept if number not in held)
        return trained or tuple(sample for _, sample in self._kept)


def _describe_row(row: Row) -> dict[str, Any] | None:
    """Return the filled fields that make a row what it is, or None where they are too long or no JSON."""
    empty = Row()
    values = {field.name: getattr(row, field.name) for field in fields(row) if field.compare}
    content = {name: value for name, value in values.items() if value != getattr(empty, name)}
    try:
        text = json.dumps(content)
    except (TypeError, ValueError):  # a table's column may hold dates in a tool's arguments
        return None
    return content if len(text) <= _LONGEST_SAMPLE and json.loads(text) == content else None


def encode_sample(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, sample: TextSample) -> list[list[int]]:
    """Encode a sample's row as training does; return the tokens of every side.

    Raises:
        TemplateError: the template refuses the row.
    """
    # Which tokens are trained is not asked here, and "all" takes any row.
    encoder = RowEncoder(tokenizer, template, "all", sample.shape)
    source = SourceRow(0, Place(""), sample.kind, Row(**sample.row))
    return [side for rows in encoder.encode([source]) for row in rows for side in row.sides]


def render_sample(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, sample: TextSample) -> list[str] | None:
    """Return the text of every side of a sample, whose tokens are `token_ids` and perhaps others behind them.

    It is None where another program cannot be asked: for rows of tokens, and for texts that spell control tokens, which training
    reads as plain text.

    Raises:
        TemplateError: the template refuses the row.
    """
    row = Row(**sample.row)
    pattern = compile_spellings(list_control_spellings(tokenizer))
    if sample.kind == "tokens" or pattern.search(json.dumps(sample.row, ensure_ascii=False)):
        return None
    if sample.kind == "text":
        return [f"{tokenizer.bos_token}{row.text}{tokenizer.eos_token}"]
    if sample.shape == "prompt":
        return [render_prompt(tokenizer, template, row.messages)]
    sides = list_sides(row, sample.kind, sample.shape)
    return render_conversations(tokenizer, template, sides, [row.tools] * len(sides)).texts


@dataclass(frozen=True)
class TokenDifference:
    """Where a tokenizer gives other tokens than were trained; `differing` and `compared` count samples."""

    differing: int
    compared: int
    text: str
    trained: list[str]
    found: list[str]

    def __str__(self) -> str:
        """Return the difference for a person."""
        rows = describe_count(self.compared, "row")
        return (
            f"{describe_count(self.differing, f'of {rows} becomes', f'of {rows} become')} other tokens; the first difference: {self.text!r} was trained as "
            f"{' '.join(self.trained)}, and becomes {' '.join(self.found)}"
        )


def compare_samples(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, samples: Iterable[TextSample]
) -> TokenDifference | None:
    """Encode samples anew, and return how their tokens differ from those that were stored, or None where none does.

    Raises:
        TemplateError: the template refuses a row.
    """
    compared, pairs = 0, []
    for sample in samples:
        compared += 1
        found = encode_sample(tokenizer, template, sample)
        sides = zip(sample.token_ids, found, strict=True)
        pair = next(((ids, new) for ids, new in sides if ids != new[:_SAMPLE_TOKENS]), None)
        pairs += [] if pair is None else [pair]
    if not pairs:
        return None
    return _describe(tokenizer, *pairs[0], differing=len(pairs), compared=compared)


def _describe(
    tokenizer: PreTrainedTokenizerBase, trained: list[int], found: list[int], *, differing: int, compared: int
) -> TokenDifference:
    """Name the tokens around the first difference."""
    shared = zip(trained, found, strict=False)
    start = next((place for place, (old, new) in enumerate(shared) if old != new), min(len(trained), len(found)))
    pieces = [
        [repr(piece)[1:-1] for piece in tokenizer.convert_ids_to_tokens(ids[max(0, start - 1) : start + 3])]
        for ids in (trained, found)
    ]
    text = str(tokenizer.decode(trained[max(0, start - 1) : start + 3]))
    return TokenDifference(differing, compared, text, *pieces)


def encode_header(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, role: str) -> list[int]:
    """Return the tokens that every conversation begins with whose first turn is of this role, up to its text.

    Raises:
        TemplateError: the template refuses the role.
    """
    first, second = (
        encode_sample(tokenizer, template, TextSample("conversation", "sequence", {"messages": turns}, []))[0]
        for turns in (_make_turns(role, "a"), _make_turns(role, "7"))
    )
    shared = zip(first, second, strict=False)
    return first[: next(place for place, (old, new) in enumerate(shared) if old != new)]


def _make_turns(role: str, text: str) -> list[dict[str, str]]:
    turns = [{"role": role, "content": text}]
    if role == "system":
        turns.append({"role": "user", "content": "b"})
    return [*turns, {"role": "assistant", "content": "c"}]
