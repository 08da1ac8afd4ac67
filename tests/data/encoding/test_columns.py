"""Prepared rows know where they stood, and their fingerprint does not."""

import json

import pytest

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings, Source
from finetune.errors import Place

PAIRS = [{"prompt": f"Q{number}", "chosen": "A", "rejected": "B"} for number in range(3)]


@pytest.mark.parametrize("shape", ["sequence", "pair", "labelled", "prompt"])
def test_the_fingerprint_does_not_depend_on_where_rows_stood(nano_llama, tmp_path, shape):
    tokenizer = load_tokenizer(nano_llama)
    lines, rows = tmp_path / "lines.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    rows.write_text(json.dumps(PAIRS), encoding="utf-8")
    prints = set()
    for path, numbers, unit in ((lines, (1, 3, 5), "line"), (rows, (1, 2, 3), "row")):
        settings = DataSettings(train=(Source(path),), shape=shape)
        splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), seed=0)
        places = list(dict.fromkeys(Place(**place) for place in splits.train["place"]))
        assert places == [Place(str(path), number, unit) for number in numbers]
        assert list(dict.fromkeys(splits.train["origin"])) == [str(place) for place in places]
        prints.add(splits.report.fingerprint)
    assert len(prints) == 1
