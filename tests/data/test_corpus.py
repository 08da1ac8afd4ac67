"""The corpus that nano is pre-trained on: reproducible, true where it computes, and apart from what it is evaluated on."""

import contextlib
import io
import json
import re
import runpy

import pytest

from finetune.files.resources import find_demo_data
from finetune.mixtures.categories import CATEGORIES

CORPUS = runpy.run_path(str(find_demo_data("corpus.py")))


def read_texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two seeds, and the first once more: texts by file name."""
    found = []
    for seed in (1, 2, 1):
        folder = tmp_path_factory.mktemp("corpus")
        CORPUS["write_corpus"](folder, seed)
        found.append({path.stem: read_texts(path) for path in folder.iterdir()})
    return found


def test_the_seed_decides_all_but_the_held_out_texts(corpora):
    first, second, again = corpora
    assert first == again
    assert set(first) == {*CORPUS["WRITERS"], "held_out"} <= {*CATEGORIES, "held_out"}
    assert [name for name in first if first[name] == second[name]] == ["held_out"]
    assert len(first["held_out"]) == 30 + 30 + 16 + 16


def test_no_text_stands_twice_or_is_held_out(corpora):
    for corpus in corpora:
        texts = [text for name, rows in corpus.items() for text in rows]
        assert len(texts) == len(set(texts))
        sizes = {name: sum(len(text.encode()) for text in rows) for name, rows in corpus.items() if name != "held_out"}
        assert all(0 <= sizes[name] - size < 1000 for name, size in CORPUS["SIZES"].items())


def test_every_sum_is_right(corpora):
    text = "\n".join(text for name in ("mathematics", "instruction") for text in corpora[0][name])
    sums = re.findall(r"(\d+) ([+×]) (\d+) = (\d+)", text)
    assert len(sums) > 1500
    for first, sign, second, result in sums:
        value = int(first) + int(second) if sign == "+" else int(first) * int(second)
        assert value == int(result), f"{first} {sign} {second} = {result}"


def test_every_program_prints_what_its_comment_says(corpora):
    for text in corpora[0]["code"][:300]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(text, {})
        said = text.rstrip().rpartition("# ")[2]
        assert said == (" ".join(printed.getvalue().split("\n")).strip() or "nothing")


def test_chinese_counts_add_up(corpora):
    given = [re.search(r"送给..(\d+)个..，自己还有(\d+)个", text) for text in corpora[0]["chinese"]]
    counts = [re.search(r"我有(\d+)个", text) for text in corpora[0]["chinese"]]
    both = [(gift, count) for gift, count in zip(given, counts, strict=True) if gift and count]
    assert len(both) > 50
    assert all(int(gift[1]) + int(gift[2]) == int(count[1]) for gift, count in both)
