"""Near-duplicates against the true share of common word groups, counted by brute force."""

import itertools
import json
import random

import pytest

from finetune.data.lint.near_duplicates import SIMILAR, NearIndex, list_word_groups, sign_text

WORDS = [f"word{number}" for number in range(1000)]


def overlap(one, other):
    first, second = set(list_word_groups(one)), set(list_word_groups(other))
    return len(first & second) / len(first | second)


def test_word_groups():
    assert list_word_groups("One two, THREE four!") == ["one two three", "two three four"]
    assert list_word_groups("天空是蓝") == ["天 空 是", "空 是 蓝"]
    assert list_word_groups("too short") == []


def test_short_texts_are_not_compared():
    assert sign_text(" ".join(WORDS[:11])) is None
    assert sign_text(" ".join(WORDS[:12])) is not None


def test_the_nearest_is_found_with_its_place():
    text = " ".join(WORDS[:200])
    index = NearIndex()
    index.add("a", sign_text(" ".join(WORDS[20:200])))
    index.add("b", sign_text(text))
    index.add("c", sign_text(" ".join(WORDS[300:600])))
    assert index.find(sign_text(text)) == ("b", 1.0)
    assert index.find(sign_text(" ".join(WORDS[600:800]))) is None


@pytest.mark.parametrize(("kept", "fewest", "most"), [(0.95, 198, 200), (0.9, 170, 200), (0.6, 0, 4), (0.3, 0, 0)])
def test_how_many_pairs_are_found(kept, fewest, most):
    """Of 200 pairs with a known overlap: nearly all above the limit, nearly none below it."""
    chooser, found = random.Random(0), 0
    for _ in range(200):
        words = chooser.sample(WORDS, 300)
        common = round(600 * kept / (1 + kept))  # common / (300 + 300 - common) = kept
        other = words[:common] + chooser.sample([word for word in WORDS if word not in words], 300 - common)
        assert overlap(" ".join(words), " ".join(other)) == pytest.approx(kept, abs=0.015)
        index = NearIndex()
        index.add("first", sign_text(" ".join(words)))
        found += index.find(sign_text(" ".join(other))) is not None
    assert fewest <= found <= most


@pytest.mark.parametrize("name", ["identity.json", "alpaca_zh_demo.json"])
def test_real_rows_against_brute_force(shared, name):
    rows = json.loads((shared / "data" / name).read_text(encoding="utf-8"))[:300]
    texts = list(dict.fromkeys(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows))
    texts = [text for text in texts if sign_text(text) is not None]
    near = {
        second
        for first, second in itertools.combinations(range(len(texts)), 2)
        if overlap(texts[first], texts[second]) > 0.9
    }
    far = {
        second
        for second in range(len(texts))
        if all(overlap(texts[first], texts[second]) < SIMILAR - 0.15 for first in range(second))
    }
    index, found = NearIndex(), set()
    for number, text in enumerate(texts):
        if index.find(sign_text(text)):
            found.add(number)
        index.add(str(number), sign_text(text))
    assert near <= found
    assert not far & found
