"""Token ids and masks are those of TRL's own preparation, on every row of real files that both can read."""

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.formats.row_formats import choose_format, read_row
from finetune.data.reading.raw_files import read_file
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError

COLUMNS = {
    "gsm8k_train.jsonl": {"prompt": "question", "completion": "answer"},
    "HumanEval.jsonl.gz": {"completion": "canonical_solution"},
}
# Not the file of tool calls: its arguments differ from row to row, and Arrow, which TRL reads rows from, gives each row all
# arguments of the others.
CONVERSATIONS = (
    "gsm8k_train.jsonl",
    "alpaca_en_demo.json",
    "alpaca_zh_demo.json",
    "identity.json",
    "HumanEval.jsonl.gz",
    "kto_en_demo.json",
    "dpo_en_demo.json",
)


@pytest.fixture(scope="module")
def prepare_with_trl(nano_llama, tmp_path_factory):
    """Return a function that lets TRL's trainer tokenize rows."""
    tokenizer = load_tokenizer(nano_llama)
    tokenizer.chat_template = find_template("yulan-mini", tokenizer).source
    model = AutoModelForCausalLM.from_pretrained(nano_llama)

    def prepare(rows):
        config = SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            assistant_only_loss="messages" in rows[0],
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        return trainer.train_dataset

    return prepare


@pytest.fixture
def prepare(nano_llama, tmp_path):
    """Return a function that prepares rows as the kit does, from a file."""

    def run(rows):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        tokenizer = load_tokenizer(nano_llama)
        settings = DataSettings(train=(Source(tmp_path / "rows.jsonl"),), max_tokens=100_000)
        return load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), 0).train

    return run


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rows_equal_trls(prepare, prepare_with_trl, shared, name):
    rows = list(read_conversations(shared / "data" / name, COLUMNS.get(name, {})))
    ours, theirs = prepare(rows), prepare_with_trl(rows)
    assert len(ours) == len(theirs) == len(rows) > 80
    different = {
        number
        for key in ("input_ids", "labels")
        for number, pair in enumerate(zip(ours[key], theirs[key], strict=True))
        if pair[0] != pair[1]
    }
    # TRL lets a text that spells a control token become that token.
    assert different == {number for number, row in enumerate(rows) if "</s>" in json.dumps(row)}


def test_texts_equal_trls(prepare, prepare_with_trl, shared):
    """TRL trains a text with its bos; nothing stands before that, so no loss comes of it."""
    rows = [raw for _, raw in read_file(shared / "data" / "c4_demo.jsonl")]
    ours, theirs = prepare(rows), prepare_with_trl([{"text": row["text"]} for row in rows])
    assert len(ours) == len(theirs) == 300
    assert ours["input_ids"][:] == theirs["input_ids"][:]


def read_conversations(path, columns):
    """Yield the rows that can be trained, as what both are given."""
    for place, raw in read_file(path):
        try:
            row = read_row(choose_format("auto", columns, raw, place), columns, raw, place)
        except DataError:
            continue
        messages = [*row.messages, *row.chosen]
        yield {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
