"""Turn rendered text into tokens with trained spans, so that no text of a row becomes a control token.

A row may hold the spelling of a control token, such as `</s>`. Before rendering, each spelling is replaced by one lone surrogate
(half a character). After rendering, all spellings come from the template and become control tokens; the surrogates are
replaced by the spellings again and become plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
# UTF-8 text holds no lone surrogates, and rows with them are refused, so they are free to stand for spellings.
_FIRST_SURROGATE = 0xD800


@dataclass(frozen=True)
class TokenSpans:
    """A text as tokens. `spans` holds the trained runs of tokens as `(first, after the last)`."""

    token_ids: list[int]
    spans: list[Span]


def list_control_spellings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the spellings of the tokenizer's control tokens, the longest first."""
    return _list_spellings(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


# Cached: the tokenizer takes 15 ms to return its added tokens, and this is called for every row.
@lru_cache(maxsize=4)
def _list_spellings(tokenizer: PreTrainedTokenizerBase, _size: int, special: tuple[str, ...]) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    spellings = {*special, *(token.content for token in added if token.special)}
    return tuple(sorted(spellings, key=lambda text: (-len(text), text)))


@lru_cache(maxsize=8)
def compile_spellings(spellings: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that matches any of the spellings."""
    return re.compile("|".join(map(re.escape, spellings)))


def hide_spellings(value: Any, pattern: re.Pattern[str], hidden: dict[str, str]) -> Any:
    """Replace each spelling in the texts of a value by a lone surrogate; `hidden` maps surrogates to spellings."""
    if isinstance(value, str):
        return pattern.sub(lambda match: _hide(match.group(), hidden), value)
    if isinstance(value, Mapping):
        return {hide_spellings(k, pattern, hidden): hide_spellings(v, pattern, hidden) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [hide_spellings(inner, pattern, hidden) for inner in value]
    return value


def _hide(spelling: str, hidden: dict[str, str]) -> str:
    for mark, known in hidden.items():
        if known == spelling:
            return mark
    mark = chr(_FIRST_SURROGATE + len(hidden))
    hidden[mark] = spelling
    return mark


def holds_spelling(messages: Sequence[Mapping[str, Any]], tools: object, pattern: re.Pattern[str]) -> bool:
    """Tell whether any text of a conversation holds the spelling of a control token."""
    for message in messages:
        content = message.get("content")
        if content and pattern.search(content):
            return True
        # Beside its role and text, a message may hold tool calls and thoughts.
        if len(message) > 2 and pattern.search(json.dumps(message, ensure_ascii=False)):
            return True
    return tools is not None and pattern.search(json.dumps(tools, ensure_ascii=False)) is not None


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Any]:
    """Tokenize texts in one call, which releases Python's lock; `find_spans` reads the result."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encodings: list[Any] = backend.encode_batch(list(texts), add_special_tokens=False)
    return encodings


def find_spans(encoding: Any, text: str, spans: Sequence[Span]) -> TokenSpans:
    """Return the tokens of a text; `spans` are its trained characters. A token is trained where any of its characters is."""
    found = [_find_tokens(encoding, len(text), start, end) for start, end in spans if end > start]
    return TokenSpans(encoding.ids, found)


def _find_tokens(encoding: Any, length: int, start: int, end: int) -> Span:
    # Three look-ups of a character are much cheaper than the offsets of every token.
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    after = len(encoding) if end == length else encoding.char_to_token(end)
    if first is not None and last is not None and after is not None and after > last:
        return first, after
    return mark_span(encoding.offsets, start, end)


def mark_span(offsets: Sequence[Span], start: int, end: int) -> Span:
    """Return the run of tokens that hold any character from `start` up to `end`."""
    first = next((number for number, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    after = first
    while after < len(offsets) and offsets[after][0] < end:
        after += 1
    return first, after


def encode_hidden(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], hidden: Mapping[str, str]
) -> TokenSpans:
    """Tokenize a text with hidden spellings: they become plain text, and the template's own spellings control tokens."""
    pattern = compile_spellings(list_control_spellings(tokenizer))
    token_ids: list[int] = []
    offsets: list[Span] = []
    position = 0
    for match in [*pattern.finditer(text), None]:
        end = match.start() if match else len(text)
        if end > position:
            ids, places = _encode_plain(tokenizer, text[position:end], hidden)
            token_ids += ids
            offsets += [(position + start, position + stop) for start, stop in places]
        if match:
            token_ids.append(int(tokenizer.convert_tokens_to_ids(match.group())))
            offsets.append(match.span())
            position = match.end()
    return TokenSpans(token_ids, [mark_span(offsets, start, end) for start, end in spans if end > start])


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, text: str, hidden: Mapping[str, str]
) -> tuple[list[int], list[Span]]:
    """Tokenize a text as plain text, its hidden spellings put back. The offsets count characters of `text`."""
    origin: list[int] = []
    pieces: list[str] = []
    for number, character in enumerate(text):
        piece = hidden.get(character, character)
        pieces.append(piece)
        origin += [number] * len(piece)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        encoding = backend.encode("".join(pieces), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = False
    # `max`: a token without characters would have no last one. Byte-level tokenizers have no such token.
    return encoding.ids, [(origin[start], origin[max(start, end - 1)] + 1) for start, end in encoding.offsets]


def encode_plain_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenSpans]:
    """Tokenize documents as plain text between bos and eos. All tokens but bos are trained."""
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = False
    rows = [[tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id] for encoding in encodings]
    return [TokenSpans(row, [(1, len(row))]) for row in rows]
