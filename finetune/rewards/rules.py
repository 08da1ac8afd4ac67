"""The table of reward rules: each takes one answer and returns a number.

Rewards lie between 0 and 1, penalties between -1 and 0, so that a recipe's weights can be compared. The three penalties are those
of the authors' PPO. The module is pure Python, so that a recipe can be checked without importing torch.

Source: YuLan-Mini (arXiv 2412.17743), post-training: penalties for truncated, mixed-language and one-sentence answers.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from finetune.data.languages import (
    count_units,
    cut_prose,
    describe_language_change,
    describe_mixture,
    is_about_languages,
)


@dataclass(frozen=True)
class Answer:
    """One answer of the model; `reference` is the row's reference answer, if any, `wanted_tokens` the recipe's `length_tokens`."""

    question: str
    text: str
    reference: str | None = None
    tokens: int = 0
    is_truncated: bool = False
    wanted_tokens: int | None = None


@dataclass(frozen=True)
class Rule:
    """One rule; `needs_reference` is a need of the row, `needs_length` one of the recipe."""

    name: str
    judge: Callable[[Answer], float]
    description: str
    needs_reference: bool = False
    needs_length: bool = False


_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
# More than 300 digits are no meaningful number, and Python refuses to convert very long ones.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,300})(?:\.[0-9]{1,300})?(?:/[0-9]{1,300})?(?![0-9/])"
    r"|(?<![A-Za-z0-9_.])[-+]?\.[0-9]{1,300}(?![0-9])"
)
_DECORATION = re.compile(r"\\[,;!:]|\\text\{[^{}]*\}|[\s$€£¥%]|\\%|\\\$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])|\n+")
_RELATIVE_TOLERANCE = 1e-6


def judge_final_answer(answer: Answer) -> float:
    """Return 1 where the final answer equals that of the reference answer; two numbers are compared as numbers.

    A reference answer without a marked result or a number, such as `Paris`, must equal the whole answer.
    """
    reference = answer.reference or ""
    found, wanted = find_final_answer(answer.text), find_final_answer(reference)
    if wanted is None:
        return float(_tidy(answer.text) == _tidy(reference))
    if found is None:
        return 0.0
    one, other = _read_number(found), _read_number(wanted)
    if one is not None and other is not None:
        return float(math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE))
    return float(_tidy(found) == _tidy(wanted))


def find_final_answer(text: str) -> str | None:
    """Find the result that a text gives: what follows the last `####`, the last `\\boxed{}`, or the last number."""
    text = unicodedata.normalize("NFKC", text)
    if marked := _MARKED.findall(text):
        return str(marked[-1]).strip()
    if (boxed := _find_boxed(text)) is not None:
        return boxed
    numbers = _NUMBER.findall(text)
    return str(numbers[-1]) if numbers else None


def _find_boxed(text: str) -> str | None:
    starts = [match.end() for match in _BOXED.finditer(text)]
    depth = 1
    for position in range(starts[-1], len(text)) if starts else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[starts[-1] : position].strip()
    return None


def _read_number(text: str) -> Fraction | None:
    """Read a number that may have a unit: `$1,200`, `12 apples`, `3/4`, `50%`."""
    text = _FRACTION.sub(r"\1/\2", text)
    numbers = _NUMBER.findall(_DECORATION.sub(" ", text))
    if len(numbers) != 1:
        return None
    above, _, below = numbers[0].replace(",", "").partition("/")
    divisor = Fraction(below or 1)
    return Fraction(above) / divisor if divisor else None


def _tidy(text: str) -> str:
    return _DECORATION.sub("", text).rstrip(".").casefold()


def judge_format(answer: Answer) -> float:
    """Return 1 where the result is marked: `#### 42` on the last line, or `\\boxed{42}`."""
    lines = unicodedata.normalize("NFKC", answer.text).strip().splitlines()
    is_marked = bool(lines) and _MARKED.search(lines[-1]) is not None
    return float(is_marked or _find_boxed(answer.text) is not None)


def judge_length(answer: Answer) -> float:
    """Return 1 up to the wanted number of tokens, then less, linearly down to 0 at twice as many."""
    wanted = answer.wanted_tokens or 1
    return min(1.0, max(0.0, 2.0 - answer.tokens / wanted))


def judge_language(answer: Answer) -> float:
    """Return the share of the answer's prose that is in the script of its question."""
    asked, answered = count_units(cut_prose(answer.question)), count_units(cut_prose(answer.text))
    if not asked or is_about_languages(answer.question):
        return 1.0
    main = max(asked, key=lambda script: asked[script])
    return answered.get(main, 0) / sum(answered.values()) if answered else 0.0


def penalize_truncated(answer: Answer) -> float:
    """Return -1 for an answer that was cut off before a stop token."""
    return -float(answer.is_truncated)


def penalize_mixed_language(answer: Answer) -> float:
    """Return -1 for an answer that mixes scripts, or is not in the language of its question."""
    mixes = describe_mixture(answer.question, answer.text) or describe_language_change(answer.question, answer.text)
    return -float(mixes is not None)


def penalize_one_sentence(answer: Answer) -> float:
    """Return -1 for an answer of a single sentence, or of none."""
    sentences = [part for part in _SENTENCE_END.split(answer.text.strip()) if part and part.strip()]
    return -float(len(sentences) < 2)


def find_reference_rule(names: Iterable[str]) -> str | None:
    """Return the first rule that needs a reference answer, as messages name it, or None."""
    return next((f"the reward {name}" for name in names if RULES[name].needs_reference), None)


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("final_answer", judge_final_answer, "the final answer is the row's", needs_reference=True),
        Rule("format", judge_format, "the result stands behind #### or in \\boxed{}"),
        Rule("length", judge_length, "no longer than rewards.length_tokens", needs_length=True),
        Rule("language", judge_language, "written in the script of the question"),
        Rule("truncated", penalize_truncated, "penalty: did not end by itself"),
        Rule("mixed_language", penalize_mixed_language, "penalty: mixes languages, or leaves the question's"),
        Rule("one_sentence", penalize_one_sentence, "penalty: a single sentence"),
    )
}
