"""The published mixtures: carried whole, every data set in a category, and a person's own files in their proportions."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from finetune.files.resources import find_resource_folder
from finetune.mixtures.categories import _CATEGORY_OF, CATEGORIES, find_category
from finetune.mixtures.matched import list_unknown_sources, match_sources
from finetune.mixtures.mixture_plot import _LABEL_HEIGHT, _make_figure, _spread
from finetune.mixtures.published import Mixture, choose_mixtures, find_mixture, list_mixtures, list_used_datasets

FOLDER = find_resource_folder("recipes") / "mixtures"
NAMES = {name for mixture in list_mixtures() for name in mixture.tokens}


def test_the_published_numbers_are_carried_unchanged(shared):
    for name, content in (("curriculum", None), ("used_datasets", "datasets")):
        carried = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        published = json.loads((shared / "reference" / f"{name}.json").read_text(encoding="utf-8"))
        assert (carried if content is None else carried[content]) == published
        assert carried["source"].startswith("RUC-GSAI/YuLan-Mini, pretrain/datasets")


def test_phases_and_their_two_names():
    names = [mixture.name for mixture in list_mixtures()]
    assert names == [*(f"phase{phase}" for phase in range(1, 26)), "phase26-4k", "phase26", "phase27"]
    assert [(mixture.name, mixture.context) for mixture in choose_mixtures(26)] == [
        ("phase26-4k", "4K"),
        ("phase26", "28K"),
    ]
    first = find_mixture("phase1")
    assert first.total == 40.1841 and first.tokens["fineweb-edu"] == 16.20478
    assert first.shares["fineweb-edu"] == pytest.approx(16.20478 / 40.1841, rel=1e-4)
    assert next(iter(first.shares)) == "fineweb-edu"


@pytest.mark.parametrize("mixture", list_mixtures(), ids=lambda mixture: mixture.name)
def test_shares_add_up(mixture):
    # Phase 19's data sets add up to 6 million tokens less than the total that stands with them.
    assert sum(mixture.tokens.values()) == pytest.approx(mixture.total, rel=2e-4)
    assert sum(mixture.shares.values()) == pytest.approx(1)
    assert sum(mixture.categories.values()) == pytest.approx(1)
    # The authors held Chinese at a tenth throughout: a grouping that lost or mixed up a data set would not show it.
    assert mixture.categories["chinese"] == pytest.approx(0.1, abs=0.002)


def test_every_dataset_has_a_category_and_every_row_of_the_table_is_needed():
    assert len(NAMES) == 291
    used = Counter(find_category(name) for name in NAMES)
    assert set(used) == set(CATEGORIES)
    parts = {"/".join(name.split("/")[:end]) for name in NAMES for end in range(1, name.count("/") + 2)}
    assert set(_CATEGORY_OF) <= parts
    assert not set(CATEGORIES) & parts, "a category and a data set of one name could not be told apart in a recipe"
    with pytest.raises(KeyError):
        find_category("somebody/else")


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("the-stack-v2/R", "code"),
        ("the-stack-v2/Lean", "mathematics"),
        ("aa_math/cosmopedia/stories", "synthetic"),
        ("aa_math/cosmopedia/auto_math_text", "mathematics"),
        ("decay/ruozhiba", "instruction"),
        ("decay/chinese-poetry", "chinese"),
        ("wjp_scored/gsm8k.0/4", "mathematics"),
        ("MNBVC/code/matlab", "code"),
    ],
)
def test_the_longest_name_decides(name, category):
    assert find_category(name) == category


def test_the_readme_lists_every_open_dataset():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if "| <http" in line]
    assert rows == [f"| {entry['name']} | <{entry['url']}> |" for entry in list_used_datasets()]
    assert len(rows) == 91
    root = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "recipes/mixtures/README.md" in root and "examples/mixtures.png" in root


MIXTURE = Mixture(
    "test", 1, "4K", 10.0, {"fineweb-edu": 5.0, "the-stack-v2/R": 2.0, "the-stack-v2/Coq": 1.0, "ioccc": 2.0}
)


@pytest.mark.parametrize(
    ("names", "shares", "left_out"),
    [
        (["fineweb-edu", "ioccc"], {"fineweb-edu": 5 / 7, "ioccc": 2 / 7}, ("the-stack-v2/R", "the-stack-v2/Coq")),
        (["the-stack-v2"], {"the-stack-v2": 1}, ("fineweb-edu", "ioccc")),
        (["code", "web"], {"code": 4 / 9, "web": 5 / 9}, ("the-stack-v2/Coq",)),
        (["code", "the-stack-v2/R"], {"code": 1 / 2, "the-stack-v2/R": 1 / 2}, ("fineweb-edu", "the-stack-v2/Coq")),
        (["code", "the-stack-v2"], {"code": 2 / 5, "the-stack-v2": 3 / 5}, ("fineweb-edu",)),
        (["web", "code", "mathematics"], {"web": 0.5, "code": 0.4, "mathematics": 0.1}, ()),
    ],
)
def test_shares_are_renormalised(names, shares, left_out):
    matched = match_sources(MIXTURE, names)
    assert matched.shares == pytest.approx(shares)
    assert set(matched.left_out) == set(left_out)
    assert matched.covered == pytest.approx(1 - sum(MIXTURE.shares[name] for name in left_out))


def test_what_is_left_out_is_said():
    assert match_sources(MIXTURE, ["fineweb-edu", "ioccc"]).describe() == (
        "mixture test: your sources stand for 70.0% of its tokens; scaled to 100%, by text: fineweb-edu 71.4%, "
        "ioccc 28.6%. Left out: 2 of 4 data sets (the-stack-v2/R, the-stack-v2/Coq)"
    )
    whole = match_sources(MIXTURE, ["web", "code", "mathematics"]).describe()
    assert whole == "mixture test, all of it, by text: web 50.0%, code 40.0%, mathematics 10.0%"
    assert match_sources(find_mixture("phase27"), ["fineweb-edu"]).describe().endswith(" and 118 more)")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["finweb-edu"], "unknown; did you mean 'fineweb-edu'? `finetune mixtures --phase 26` lists the names"),
        (["Code"], "unknown; did you mean 'code'? `finetune mixtures --phase 26` lists the names"),
        (["zzz"], "unknown; `finetune mixtures --phase 26` lists the names"),
        (["gutenberg-book-en"], "phase26 has no such data; it is in 12 others, phase1 to phase12"),
        (["decay/ruozhiba"], "phase26 has no such data; it is in phase27"),
        (["decay/Spurline", "fineweb-edu", "dclm_baseline", "dolma-unzip/reddit", "cicg-news-en", "web"], None),
    ],
)
def test_names_that_stand_for_nothing(names, reason):
    found = list(list_unknown_sources(find_mixture("phase26"), names))
    shadowed = "other sources with more specific names cover all of it in phase26; remove it"
    assert found == [("web", shadowed) if reason is None else (names[0], reason)]


def test_the_plot_shows_every_phase_and_category():
    (axes,) = _make_figure(list_mixtures()).axes
    bars = axes.patches
    assert len(bars) == 28 * len(CATEGORIES)
    tops = [bar.get_y() + bar.get_height() for bar in bars[-28:]]
    assert tops == pytest.approx([1] * 28)
    assert bars[0].get_height() == pytest.approx(find_mixture("phase1").categories["web"])
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks[24:] == ["25", "26\n4K", "26\n28K", "27\n28K"]
    texts = [text.get_text() for text in axes.texts]
    assert "web 48%" in texts and "38% web" in texts


@pytest.mark.parametrize("heights", [[0.1, 0.11, 0.12, 0.9], [0.97, 0.98, 0.99, 1.0], [0.2, 0.4, 0.6, 0.8]])
def test_labels_stand_apart(heights):
    spread = _spread(heights)
    assert all(b - a >= _LABEL_HEIGHT - 1e-9 for a, b in itertools.pairwise(spread))
    assert spread[-1] <= 1
