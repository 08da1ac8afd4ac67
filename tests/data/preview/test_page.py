"""The page: it holds every token once, escapes everything, needs nothing else, and replaces only what is its own."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.preview.page import (
    PageColumn,
    PagePiece,
    PageRow,
    collect_page,
    render_page,
    split_tokens,
    write_page,
)
from finetune.data.settings import DataSettings, Source
from finetune.errors import OutputError

EVIL = "<script>alert(1)</script></style></div>--><img src=x onerror=alert(2)> \"q\" 's' & &amp; {{ 7*7 }} {% raw %}"
ROWS = [
    {"prompt": EVIL, "completion": f"  indented\n\n\ttab {EVIL}"},
    {"prompt": "什么是质数？", "completion": "质数 🎉👩‍👩‍👧 café مرحبا ｆｕｌｌ"},
    {"prompt": "Why so?", "completion": "Because it is."},
]


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.fixture
def splits(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(
        json.dumps(ROWS[2]) + "\n" + json.dumps({**ROWS[2], "completion": "so " * 400}), encoding="utf-8"
    )
    settings = DataSettings(train=(Source(path),), evaluation=(Source(held_out),), overflow="drop", max_tokens=700)
    return load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), seed=0)


class Reader(HTMLParser):
    """Collects tags, attributes, the texts of rows with their marks, and the token ids."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts, self.trained, self.ids = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append((tag, values))
        if values.get("class") == "text":
            for found in (self.texts, self.trained):
                found.append("")
            self.ids.append([])
        if tag == "span" and "title" in values:
            self.ids[-1] += [int(token) for token in values["title"].split()]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(values.get("class") == "text" for _, values in self.open):
            self.texts[-1] += data
            if any(tag == "mark" for tag, _ in self.open):
                self.trained[-1] += data


def parse(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_every_text_token_and_mark(splits, tokenizer):
    reader = parse(render_page(collect_page(splits, tokenizer, 3, "recipe.yaml")))
    for number, row in enumerate(splits.train):
        assert reader.ids[number] == row["input_ids"]
        assert reader.texts[number] == tokenizer.decode(row["input_ids"])
        assert ROWS[number]["prompt"] in reader.texts[number]
        assert reader.trained[number] == ROWS[number]["completion"] + "<|eot_id|>"


def test_no_text_becomes_markup(splits, tokenizer):
    page = collect_page(splits, tokenizer, 3, EVIL)
    row = PageRow(EVIL, (PageColumn(EVIL, (PagePiece(EVIL, (1,), True),)),))
    source = replace(page.sources[0], name=EVIL, format=EVIL)
    report = replace(page.report, notes=(EVIL,), template=EVIL)
    plain = parse(render_page(page))
    evil = parse(render_page(replace(page, rows=(row, *page.rows), sources=(source, *page.sources), report=report)))
    assert evil.tags.count("script") == plain.tags.count("script") == 1
    assert evil.tags.count("style") == 1
    assert "img" not in evil.tags
    assert not [name for name, _ in evil.attributes if name.startswith("on")]
    assert evil.texts[0] == evil.trained[0] == EVIL


def test_it_needs_nothing_else(splits, tokenizer):
    text = render_page(collect_page(splits, tokenizer, 3, "recipe.yaml"))
    reader = parse(text)
    assert not {"link", "iframe", "object", "embed", "base", "form", "a"} & set(reader.tags)
    assert not {"src", "href", "action", "data"} & {name for name, _ in reader.attributes}
    assert not re.search(r"url\(|@import|https?://|fetch|XMLHttp|WebSocket", text)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in reader.attributes if name == "content" and "default-src" in value)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_account_of_all_rows(splits, tokenizer):
    page = collect_page(splits, tokenizer, 2, "recipe.yaml")
    assert [(source.name, source.format, source.trained, source.held_out) for source in page.sources] == [
        ("rows.jsonl", "prompt_completion", 3, 0),
        ("held_out.jsonl", "prompt_completion", 0, 1),
    ]
    assert [row.origin for row in page.rows] == ["rows.jsonl, line 1", "rows.jsonl, line 2"]
    text = render_page(page)
    assert "1 row is longer than data.max_tokens: 700 and left out (data.overflow: drop)" in text
    assert "2 rows in full" in text
    assert "Tokens in a row, held out" in text
    for upper, rows in splits.report.train.histogram:
        assert f'<td class="number">{upper:,}</td><td class="number">{rows:,}</td>' in text
    assert re.findall(r"width:([\d.]+)%", text)[0:1] != []
    nothing = replace(page, report=replace(page.report, notes=(), evaluation=None))
    assert "Nothing: every row that was read is trained or evaluated on as a whole." in render_page(nothing)
    assert "Tokens in a row, held out" not in render_page(nothing)


def test_names_of_files_are_not_read_from_texts(tokenizer, tmp_path):
    """A comma in a name, and a file whose rows have no lines."""
    path, table = tmp_path / "a, line 1, b.jsonl", tmp_path / "c.parquet"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), table)
    settings = DataSettings(train=(Source(path), Source(table)), max_tokens=700, cache=tmp_path / "cache")
    for _ in range(2):  # prepared, and from the cache
        splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), seed=0)
        page = collect_page(splits, tokenizer, 3, "recipe.yaml")
        assert [(source.name, source.trained) for source in page.sources] == [(path.name, 2), (table.name, 1)]
        assert [row.origin for row in page.rows] == [f"{path.name}, line 1", f"{path.name}, line 2", "c.parquet, row 1"]
        assert splits.train["origin"][2] == f"{table}, row 1"


def test_two_columns_side_by_side(splits, tokenizer):
    page = collect_page(splits, tokenizer, 1, "recipe.yaml")
    columns = tuple(
        PageColumn(title, (PagePiece("Q", (1, 2), False), PagePiece(title.upper(), (3,), True)))
        for title in ("chosen", "rejected")
    )
    text = render_page(replace(page, rows=(PageRow("pairs.jsonl, line 1", columns),)))
    assert parse(text).texts == ["QCHOSEN", "QREJECTED"]
    assert "chosen: 3 tokens, 1 trained" in text
    assert "rejected: 3 tokens, 1 trained" in text
    assert text.count('<div class="columns">') == 1
    assert "1 row in full" in text


def test_tokens_of_one_character_come_together(tokenizer):
    token_ids = tokenizer("a🎉b 你", add_special_tokens=False)["input_ids"]
    pieces = list(split_tokens(tokenizer, token_ids, [False] * len(token_ids)))
    assert "".join(piece.text for piece in pieces) == "a🎉b 你"
    assert [token for piece in pieces for token in piece.token_ids] == token_ids
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_real_rows_are_shown_to_the_letter(shared, tokenizer):
    for name in ("alpaca_zh_demo.json", "kto_en_demo.json"):
        settings = DataSettings(train=(Source(shared / "data" / name),), max_tokens=100_000)
        splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), seed=0)
        for row in splits.train.select(range(100)):
            pieces = list(split_tokens(tokenizer, row["input_ids"], [label != -100 for label in row["labels"]]))
            assert "".join(piece.text for piece in pieces) == tokenizer.decode(row["input_ids"])
            assert [token for piece in pieces for token in piece.token_ids] == row["input_ids"]
            assert sum(len(p.token_ids) for p in pieces if p.is_trained) == sum(
                label != -100 for label in row["labels"]
            )


def test_only_its_own_file_is_replaced(splits, tokenizer, tmp_path):
    text = render_page(collect_page(splits, tokenizer, 1, "recipe.yaml"))
    before = sorted(tmp_path.iterdir())
    file = tmp_path / "new" / "page.html"
    write_page(file, text)
    write_page(file, text.replace("recipe.yaml", "other.yaml"))
    assert "other.yaml" in file.read_text(encoding="utf-8")
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>\nmine")
    for taken in (mine, tmp_path):
        with pytest.raises(OutputError, match="was not written by `finetune preview`"):
            write_page(taken, text)
    with pytest.raises(OutputError, match="cannot be made"):
        write_page(mine / "page.html", text)
    assert mine.read_text() == "<!doctype html>\nmine"
    assert sorted(tmp_path.iterdir()) == sorted([*before, mine, file.parent])
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    write_page(file, '<meta name="generator" content="finetune preview">old')

    def fail(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.data.preview.page.os.fdopen", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        write_page(file, "new")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text().endswith("old")
