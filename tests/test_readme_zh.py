"""The Chinese first page says what the English one says: the same commands, code, links and figures, section by section."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The Chinese page ends before the figures of the benchmarks.
ENGLISH, CHINESE = (
    re.split(r"^## ", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in ("README.md", "README.zh.md")
)
BETWEEN = {"[English](README.md)", "[中文](README.zh.md)"}


def find(pattern, section):
    return Counter(re.findall(pattern, section, re.MULTILINE))


def test_every_section_is_there():
    assert len(CHINESE) == 4 and len(ENGLISH) > 4


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "pattern",
    [r"^    ((?:finetune|pip|make)[^#\n]*?) *#", r"`([^`]+)`", r"\]\(([^)]+)\)", r"\d[\d.,]*(?:e-\d+)?"],
    ids=["commands", "code", "links", "numbers"],
)
def test_a_section_has_the_same(number, pattern):
    english, chinese = ENGLISH[number], CHINESE[number]
    for link in BETWEEN:
        english, chinese = english.replace(link, ""), chinese.replace(link, "")
    found = {text.rstrip(".,") for text in find(pattern, english)}
    assert {text.rstrip(".,") for text in find(pattern, chinese)} == found
