"""Check the text of one row. Each check returns a short description of what it found, or None."""

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
_REPEATED = re.compile(
    r"([,;:!?~，。、；：！？])\1{3,}|[!?！？]{6,}|…{5,}|(?<!\.)\.{13,}|([,;:，。、；：])(?:\s*\2){4,}"
)
_HAN_WORD_LETTERS, _LONGEST_WORD = 2, 100


def shorten(text: str, start: int = 0) -> str:
    """Return one line of about 80 characters from `text`, beginning a little before `start`."""
    begin = max(0, start - _SHOWN // 4)
    line = " ".join(text[begin : begin + 4 * _SHOWN].split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    cut = line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
    return f"…{cut}" if begin else cut


def describe_short_answer(messages: Sequence[Message]) -> str | None:
    """Look for an answer of a single word: up to two Chinese letters, or one word in a script with spaces."""
    for message in messages:
        if message["role"] == "assistant" and _is_one_word(message["content"]):
            return f"the answer is {shorten(message['content'])!r}"
    return None


def _is_one_word(text: str) -> bool:
    if len(text) > _LONGEST_WORD:
        return False
    words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:[.,:/'’-][^\W\u3400-\u9fff]+)*", text)
    if all("\u3400" <= word <= "\u9fff" for word in words):
        return len(words) <= _HAN_WORD_LETTERS
    return len(words) == 1


def describe_mojibake(messages: Sequence[Message]) -> str | None:
    """Look for text that was decoded with the wrong encoding, or has lost characters."""
    for number, message in enumerate(messages, 1):
        text = message["content"]
        if not text.isascii() and (found := _LOST_TEXT.search(text) or BADNESS_RE.search(text)):
            return f"message {number} holds {found[0]!r}: {shorten(text, found.start())}"
    return None


def describe_repeated_punctuation(messages: Sequence[Message]) -> str | None:
    """Look for an answer that repeats punctuation by mistake; code in it is ignored."""
    for message in messages:
        if message["role"] != "assistant" or not _REPEATED.search(message["content"]):
            continue
        prose = cut_prose(message["content"])
        if found := _REPEATED.search(prose):
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
