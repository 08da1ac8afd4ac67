"""Check the text of one row. Each check returns a short description of what it found, or None."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

from ftfy.badness import BADNESS_RE

from finetune.data.formats.messages import Message
from finetune.data.languages import cut_prose

_SHOWN = 80
# The replacement character, C1 controls, and common results of decoding GBK as UTF-8 or UTF-8 as GBK or Latin-1.
_LOST_TEXT = re.compile(r"[\ufffd\x80-\x9f]|锟斤拷|烫烫烫|屯屯屯|ï»¿")
# Dots, dashes and stars repeat in outlines, rules and tables; other punctuation only by mistake.
# `LEAST` and so on stand for numbers of marks.
_REPEATED = r"([,;:!?~，。、；：！？])\1{LEAST,}|[!?！？]{MIXED,}|…{ELLIPSES,}|(?<!\.)\.{DOTS,}|([,;:，。、；：])(?:\s*\2){SPACED,}"
# So many more marks than equal ones without spaces between them.
_MORE = {"LEAST": -1, "MIXED": 2, "ELLIPSES": 1, "DOTS": 9, "SPACED": 0}
_HAN_WORD_LETTERS, _LONGEST_WORD = 2, 100


def shorten(text: str, start: int = 0) -> str:
    """Return one line of about 80 characters from `text`, beginning a little before `start`."""
    begin = max(0, start - _SHOWN // 4)
    line = " ".join(text[begin : begin + 4 * _SHOWN].split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    cut = line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
    return f"…{cut}" if begin else cut


def describe_short_answer(messages: Sequence[Message], most: int) -> str | None:
    """Look for an answer of up to `most` words; a word has up to two Chinese letters, or stands alone in a script with spaces."""
    for message in messages:
        if message["role"] == "assistant" and _has_few_words(message["content"], most):
            return f"the answer is {shorten(message['content'])!r}"
    return None


def _has_few_words(text: str, most: int) -> bool:
    if len(text) > most * _LONGEST_WORD:
        return False
    words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:[.,:/'’-][^\W\u3400-\u9fff]+)*", text)
    if all("\u3400" <= word <= "\u9fff" for word in words):
        return len(words) <= most * _HAN_WORD_LETTERS
    return len(words) <= most


def describe_mojibake(messages: Sequence[Message], fewest: int) -> str | None:
    """Look for text that was decoded with the wrong encoding, or has lost characters, in at least `fewest` places."""
    texts = [(number, message["content"]) for number, message in enumerate(messages, 1)]
    places = (
        (number, text, found)
        for number, text in texts
        if not text.isascii()
        for pattern in (_LOST_TEXT, BADNESS_RE)
        for found in pattern.finditer(text)
    )
    first = list(itertools.islice(places, fewest))
    if len(first) < fewest:
        return None
    number, text, found = first[0]
    return f"message {number} holds {found[0]!r}: {shorten(text, found.start())}"


@functools.lru_cache
def _compile_repeated(fewest: int) -> re.Pattern[str]:
    pattern = _REPEATED
    for name, more in _MORE.items():
        pattern = pattern.replace(name, str(fewest + more))
    return re.compile(pattern)


def describe_repeated_punctuation(messages: Sequence[Message], fewest: int) -> str | None:
    """Look for an answer that repeats punctuation by mistake, `fewest` times or more; code in it is ignored."""
    repeated = _compile_repeated(fewest)
    for message in messages:
        if message["role"] != "assistant" or not repeated.search(message["content"]):
            continue
        prose = cut_prose(message["content"])
        if found := repeated.search(prose):
            return f"{found[0][:12]!r} in: {shorten(prose, found.start())}"
    return None


def describe_control_token(messages: Sequence[Message], control_tokens: Sequence[str]) -> str | None:
    """Look for the spelling of a control token."""
    for number, message in enumerate(messages, 1):
        for token in control_tokens:
            if (start := message["content"].find(token)) >= 0:
                return f"message {number} holds {token}: {shorten(message['content'], start)}"
    return None


def describe_equal_answers(messages: Sequence[Message], rejected: Sequence[Message]) -> str | None:
    """Tell whether both answers of a pair are the same except for white space and Unicode normalisation."""
    chosen = messages[len(messages) - len(rejected) :]
    if [_normalise(message) for message in chosen] != [_normalise(message) for message in rejected]:
        return None
    return f"both answers are: {shorten(rejected[-1]['content'])}"


def _normalise(message: Message) -> Message:
    """Return a message with its text normalised; its tool calls and thoughts stay as they are."""
    return {**message, "content": " ".join(unicodedata.normalize("NFC", message["content"]).split())}
