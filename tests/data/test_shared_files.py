"""Every real file as it lies there: read whole, trained from a short recipe; broken copies give an account, never a traceback."""

import gzip
import json
import random

import pytest

from finetune.check.recipes import load_recipe
from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError
from finetune.training.run import run_training

FILES = {
    "HumanEval.jsonl.gz": ("columns: {prompt: prompt, completion: canonical_solution}", 164),
    "alpaca_en_demo.json": ("", 999),
    "alpaca_zh_demo.json": ("", 1000),
    "c4_demo.jsonl": ("overflow: split", 300),
    "dpo_en_demo.json": ("", 300),
    "glaive_toolcall_en_demo.json": ("", 300),
    "gsm8k_train.jsonl": ("columns: {prompt: question, completion: answer}", 7473),
    "identity.json": ("substitute: {name: Lan, author: us}", 91),
    "kto_en_demo.json": ("", 300),
}
RECIPE = """
model: {{checkpoint: nano}}
data:
  train: {file}
  max_tokens: 1024
  overflow: truncate
  {extra}
adapter: {{rank: 4}}
trainer: {{max_steps: 5, per_device_train_batch_size: 2, disable_tqdm: true, save_strategy: "no"}}
"""


@pytest.mark.parametrize("name", FILES)
def test_every_file_trains_from_a_short_recipe(shared, tmp_path, nano_llama, name):
    extra, rows = FILES[name]
    text = RECIPE.format(file=shared / "data" / name, extra=extra)
    if "overflow" in extra:
        text = text.replace("  overflow: truncate\n", "")
    assert len(text.strip().splitlines()) <= 15
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    summary = run_training(load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / 'run'}"]))
    assert summary.steps == 5
    data = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    train = data["train"]
    assert train["rows_read"] + sum(data["left_out"].values()) == rows
    assert train["rows_read"] + train["parts"] == train["rows"] + train["dropped"]


def corrupt(rows, rng):
    """Return one of many kinds of broken file, as bytes."""
    rows = json.loads(json.dumps(rng.sample(rows, min(4, len(rows)))))
    row = rng.choice(rows)
    key = rng.choice(list(row))
    kind = rng.choice(["rename", "type", "cut", "encoding", "roles", "half"])
    if kind == "rename":
        row[key + "x"] = row.pop(key)
    elif kind == "type":
        row[key] = rng.choice([None, 3, True, [], {}, [[]], [{}], [None], "", 1e400, {"from": 3, "value": []}])
    elif kind == "half":
        row[key] = "\ud800"
    elif kind == "roles":
        for value in row.values():
            if isinstance(value, list):
                rng.shuffle(value)
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    place = rng.randrange(len(raw))
    if kind == "cut":
        raw = raw[:place]
    elif kind == "encoding":
        raw = raw[:place] + bytes([rng.choice([0xFF, 0x80, 0x00, 0xC3])]) + raw[place:]
    return raw


def read_raw(path):
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(raw) if path.suffix == ".json" else [json.loads(line) for line in raw.splitlines()]


def test_five_hundred_broken_files_are_told_or_counted(shared, tmp_path, nano_llama):
    tokenizer = load_tokenizer(nano_llama)
    template = find_template("yulan-mini", tokenizer)
    rng = random.Random(7)
    sources = {name: read_raw(shared / "data" / name) for name in FILES}
    columns = {
        "HumanEval.jsonl.gz": {"prompt": "prompt", "completion": "canonical_solution"},
        "gsm8k_train.jsonl": {"prompt": "question", "completion": "answer"},
    }
    told = 0
    for number in range(500):
        name = rng.choice(list(sources))
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(corrupt(sources[name], rng))
        settings = DataSettings((Source(path),), columns=columns.get(name, {}), max_tokens=1024, overflow="drop")
        lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        try:
            report = load_splits(settings, tokenizer, template, 0).report
        except DataError as error:
            told += 1
            assert str(path) in str(error) or "no row is left" in str(error)
            continue
        assert report.train.rows_read + sum(report.left_out.values()) == lines
        assert report.train.rows + report.train.dropped == report.train.rows_read
    assert 150 < told < 500
