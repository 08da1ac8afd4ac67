"""Tell the language of a text by its scripts, to find answers in another language than their question.

All languages in Latin letters count as one, because their script does not tell them apart. A unit is one Han, kana, Hangul or
Thai letter, or one word of a script that puts spaces between words. Han letters beside kana count as Japanese. Code, formulas
and addresses are left out: they are written in Latin letters in every language.
"""

import re

_UNITS = {
    "Chinese": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
    "Japanese": re.compile(r"[\u3041-\u30ff]"),
    "Korean": re.compile(r"[\uac00-\ud7af]"),
    "Thai": re.compile(r"[\u0e01-\u0e30]"),
    "Latin": re.compile(r"[A-Za-zÀ-ÖØ-öø-ɏ]{2,}"),
    "Cyrillic": re.compile(r"[\u0400-\u052f]{2,}"),
    "Arabic": re.compile(r"[\u0620-\u06ff]{2,}"),
    "Hebrew": re.compile(r"[\u05d0-\u05ea]{2,}"),
    "Devanagari": re.compile(r"[\u0900-\u097f]{2,}"),
}
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)"  # fenced code
    r"|`[^`\n]+`"  # code within a line
    r"|\$\$.+?\$\$|\$[^$\n]+\$|\\\[.+?\\\]|\\\(.+?\\\)"  # formulas
    r"|\\begin\{.+?\\end\{\w+\*?\}"
    r"|https?://[!-~]+|\S+@\S+"
    r"|</?[A-Za-z][^<>\n]*>"
    r"|\{\{.*?\}\}",
    re.DOTALL,
)
_CODE_LINE = re.compile(
    r"[;{}\\]\s*$|[=<>]=|->|=>|::|\w\(|\w\.\w+\(|^\s*[\w.\[\]]+\s*[-+*/]?=\s|^\s*[#@/*]|^\s*\w+:\s*$"
    r"|^\s*(?:def|class|import|from|return|if|elif|else|for|while|try|except|with|print|public|private|static|var|let|const"
    r"|function|select|insert|update|create|echo|sudo|pip|npm|git)\b(?!.*[.!?,]\s)",
    re.IGNORECASE,
)
_KANA_SHARE = 0.1
# With fewer units of prose, the shares of scripts say nothing.
_FEWEST_QUESTION_UNITS, _FEWEST_ANSWER_UNITS = 4, 8
_FEWEST_SECOND_UNITS = 12
# The share of a text by which a script is its language, and the share by which a second one makes a mixture.
MAIN_SHARE, SECOND_SHARE = 0.7, 0.3
_ABOUT_LANGUAGES = re.compile(
    r"translat|language|bilingual|english|chinese|mandarin|japanese|korean|french|german|spanish|italian|russian|arabic|hindi"
    r"|翻译|译成|译为|英译|汉译|译文|语言|双语|[中英日韩法德俄外汉]语|[中英日韩法德俄外]文|单词|词汇|拼音|缩写",
    re.IGNORECASE,
)


def cut_prose(text: str) -> str:
    """Return a text without code, formulas, mark-up and addresses."""
    lines = _NOT_PROSE.sub(" ", text).split("\n")
    return "\n".join(line for line in lines if not _CODE_LINE.search(line))


def count_units(text: str) -> dict[str, int]:
    """Return the units of each script in a text, code included. The module's docstring defines a unit."""
    if text.isascii():
        words = len(_UNITS["Latin"].findall(text))
        return {"Latin": words} if words else {}
    counts = {name: len(pattern.findall(text)) for name, pattern in _UNITS.items()}
    kana, han = counts["Japanese"], counts["Chinese"]
    if kana > _KANA_SHARE * (kana + han):  # Chinese texts hold a few kana too
        counts |= {"Japanese": kana + han, "Chinese": 0}
    return {name: count for name, count in counts.items() if count}


def name_language(text: str, share: float = MAIN_SHARE) -> str:
    """Return the script with at least `share` of the units, else `mixed`, or `none` for a text without letters."""
    counts = count_units(text)
    total = sum(counts.values())
    if not total:
        return "none"
    name, count = max(counts.items(), key=lambda item: item[1])
    return name if count >= share * total else "mixed"


def is_about_languages(question: str) -> bool:
    """Tell whether a question is about languages or asks for a translation: its answer may be in another language."""
    return _ABOUT_LANGUAGES.search(question) is not None


def describe_language_change(question: str, answer: str, share: float = MAIN_SHARE) -> str | None:
    """Return that an answer is in another language than its question, or None. A text is in a language by `share` of its units.

    It is None for a question that is about languages, and for texts that are too short to tell.
    """
    if (question.isascii() and answer.isascii()) or is_about_languages(question):
        return None
    asked, answered = cut_prose(question), cut_prose(answer)
    if sum(count_units(asked).values()) < _FEWEST_QUESTION_UNITS:
        return None
    if sum(count_units(answered).values()) < _FEWEST_ANSWER_UNITS:
        return None
    one, other = name_language(asked, share), name_language(answered, share)
    if one == other or "mixed" in (one, other):
        return None
    return f"asked in {one}, answered in {other}"


def describe_mixture(question: str, answer: str, share: float = SECOND_SHARE) -> str | None:
    """Return that an answer mixes scripts, or None. A second script must have at least `share` of its prose."""
    if answer.isascii() or is_about_languages(question):
        return None
    counts = sorted(count_units(cut_prose(answer)).items(), key=lambda item: -item[1])
    if len(counts) < 2 or counts[1][1] < max(_FEWEST_SECOND_UNITS, share * sum(count for _, count in counts)):
        return None
    return f"mixes {counts[0][0]} and {counts[1][0]} ({counts[0][1]:,} and {counts[1][1]:,} letters or words)"
