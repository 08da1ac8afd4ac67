"""Mixtures: which rows are taken of which source, and data sets of the hub."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.reading import json_lists
from finetune.data.reading.arrow_rows import require_row
from finetune.data.reading.raw_files import read_file
from finetune.data.reading.sources import draw_rows, hash_source, read_source
from finetune.data.settings import DataSettings, HubDataset, Source
from finetune.errors import DataError


@pytest.fixture
def make_source(tmp_path):
    """Return a function that writes numbered rows and names them as a source."""

    def make(name, count, **share):
        rows = [{"prompt": f"{name} {number}", "completion": "yes"} for number in range(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path, **share)

    return make


@pytest.fixture
def load(nano_llama):
    """Return a function that prepares the rows of sources."""
    tokenizer = load_tokenizer(nano_llama)
    template = find_template("yulan-mini", tokenizer)

    def run(*sources, seed=0, **settings):
        return load_splits(DataSettings(train=sources, **settings), tokenizer, template, seed)

    return run


def count_origins(rows):
    names = [origin.rpartition("/")[2].partition(".")[0] for origin in rows["origin"]]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_weights_give_the_largest_mixture_without_a_repeated_row(make_source, load):
    # 40 of b are 0.25 of what 160 rows are; a could give 900.
    splits = load(make_source("a", 900, weight=3), make_source("b", 40, weight=1), make_source("c", 7))
    assert count_origins(splits.train) == {"a": 120, "b": 40, "c": 7}
    assert len(set(splits.train["origin"])) == 167
    (note,) = (note for note in splits.report.notes if "not drawn" in note)
    assert note.startswith("780 rows are left out: not drawn from ")
    assert note.endswith("a.jsonl (weight: 3; 120 of 900 are taken)")


def test_text_is_weighed_in_bytes(tmp_path):
    """A source of long rows must not take more of the text than its share."""
    texts = {"long": ["a" * 900] * 40, "chinese": ["雨" * 50] * 30, "short": ["b" * 30] * 2000}
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": "x" * 500, "text": row}) + "\n" for row in rows)
        )
    sources = [
        Source(tmp_path / f"{name}.jsonl", weight=weight, weigh_text=True)
        for name, weight in (("long", 0.5), ("chinese", 0.25), ("short", 0.25))
    ]
    draws = draw_rows(sources, 0)
    # All 4,500 bytes of the Chinese rows are a quarter of 18,000.
    assert [len(draw.taken) for draw in draws] == [9000 // 900, 30, 4500 // 30]
    assert "(weight: 0.5 of the text; 10 of 40 are taken)" in draws[0].note
    assert draws == draw_rows(sources, 0) != draw_rows(sources, 1)


def test_rows_without_a_text_are_weighed_by_all_their_words(make_source):
    # "a 10" + "yes" has 7 bytes, "b 0" + "yes" 6: 12 rows of b are 72 bytes, 10 rows of a are 70.
    sources = [make_source("a", 100, weight=1, weigh_text=True), make_source("b", 12, weight=1, weigh_text=True)]
    taken = [len(draw.taken) for draw in draw_rows(sources, 0)]
    assert taken == [10, 12]


def test_rows_are_drawn_by_the_seed_and_in_the_order_of_the_file(make_source, load):
    source = make_source("a", 50, rows=20)
    first, again, other = (load(source, seed=seed).train["origin"][:] for seed in (1, 1, 2))
    assert len(first) == len(other) == 20
    assert first == again
    assert set(first) != set(other)
    lines = [int(origin.rpartition(" ")[2]) for origin in first]
    assert lines == sorted(lines)


def test_two_sources_do_not_draw_the_same_places(make_source):
    sources = [make_source("a", 100, rows=50), make_source("b", 100, rows=50)]
    first, second = draw_rows(sources, 0)
    assert first.taken != second.taken


def test_every_row_is_accounted_for(make_source, load):
    splits = load(make_source("a", 30, rows=10), make_source("b", 5), held_out=4)
    report = splits.report
    assert report.train.rows + report.evaluation.rows == 15
    assert sum(report.left_out.values()) == 20


def test_more_rows_than_there_are(make_source, load):
    with pytest.raises(DataError, match=r"a\.jsonl: holds 3 rows where rows: 5 are asked for; ask for fewer"):
        load(make_source("a", 3, rows=5))


def test_a_change_of_the_mixture_is_not_found_in_the_cache(make_source, load, tmp_path):
    for rows in (4, 6):
        splits = load(make_source("a", 10, rows=rows), cache=tmp_path / "cache")
        assert len(splits.train) == rows


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Put a data set where the hub's library would have downloaded it."""
    Dataset.from_list([{"question": f"q{n}", "answer": "a"} for n in range(5)]).save_to_disk(tmp_path / "downloaded")
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return load_from_disk(tmp_path / "downloaded")

    monkeypatch.setattr("finetune.data.reading.sources.load_dataset", load_dataset)
    return asked


def test_a_dataset_of_the_hub_is_read_once(hub, load):
    place = HubDataset("someone/questions", "main", "test", "v1")
    columns = {"prompt": "question", "completion": "answer"}
    splits = load(Source(place, rows=3), columns=columns)
    assert len(splits.train) == 3
    assert splits.train["origin"][0].startswith("someone/questions@v1/main/test, row ")
    assert [raw["question"] for _, rows in read_source(Source(place)) for _, raw in rows] == [f"q{n}" for n in range(5)]
    assert hash_source(Source(place)) != hash_source(Source(HubDataset("someone/questions")))
    assert hub[0] == (("someone/questions", "main"), {"split": "test", "revision": "v1"})
    assert len(hub) == 2  # one for each place


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DatasetNotFoundError("not there"), "the hub has no such data set or revision"),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), "Should be one of ['train']; name one with"),
        (ConnectionError("no network"), "the transfer broke off (no network); run the same command again"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, error, sentence):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("finetune.data.reading.sources.find_listing", lambda asked: SimpleNamespace(commit="c" * 40))
    monkeypatch.setattr("finetune.data.reading.sources.load_dataset", fail)
    with pytest.raises(DataError) as raised:
        [list(rows) for _, rows in read_source(Source(HubDataset(f"someone/{type(error).__name__}")))]
    assert str(raised.value).startswith(f"someone/{type(error).__name__}/train: ")
    assert sentence in str(raised.value)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_json_list_is_read_a_row_at_a_time(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_lists, "_BLOCK_CHARACTERS", block)
    rows = [{"prompt": 'p "]', "completion": "c\n雨", "n": [1, {"deep": [number] * number}]} for number in range(30)]
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert [row for _, row in read_file(tmp_path / "rows.json")] == rows


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[\n{"a": 1},\n{"a" 2}]', "line 3: broken JSON (Expecting ':' delimiter, column 6)"),
        ('[\n{"a": 1}\n{"a": 2}]', "line 3: broken JSON (Expecting ',' delimiter, column 1)"),
        ('[{"a": 1},]', "line 1: broken JSON (Expecting value, column 11)"),
        ('[{"a": 1}', "line 2: broken JSON (Expecting ',' delimiter"),
        ('[{"a": 1}] x', "broken JSON (Extra data, column 12)"),
        (
            '{\n"a": 1}\n{"a": 2}',
            "must hold a list of rows; found dict and more after it; write each row into one line",
        ),
        ('{\n"data": [{"a": 1}]}', "its rows may be the list under 'data'"),
        ('[{"a": 1},\n{"a": {"b": 1, "b": 2}}]', "line 2: the key 'b' stands twice in an object"),
        ('{"a": 1, "a": 2}\n{"a": 1}', "line 1: the key 'a' stands twice in an object"),
        ("12", "line 1: must be an object with keys; found int"),
        ("  \n", "the file is empty"),
        ("[]", "the file holds no rows"),
    ],
)
def test_broken_lists(tmp_path, monkeypatch, block, text, fault):
    monkeypatch.setattr(json_lists, "_BLOCK_CHARACTERS", block)
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        [require_row(row) for _, row in read_file(tmp_path / "rows.json")]
    assert fault in str(raised.value)
