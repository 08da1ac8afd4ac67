"""Token ids and masks are those of TRL's own preparation, on every row of real files that both can read."""

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from finetune.data.dataset import load_splits
from finetune.data.files import read_file
from finetune.data.rows import choose_format, read_row
from finetune.data.settings import DataSettings, Source
from finetune.data.template import find_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import DataError

COLUMNS = {"gsm8k_train.jsonl": {"prompt": "question", "completion": "answer"}}


@pytest.fixture(scope="module")
def prepare_with_trl(nano_llama, tmp_path_factory):
    """Return a function that lets TRL's trainer tokenize conversations, one row for each."""
    tokenizer = load_tokenizer(nano_llama)
    tokenizer.chat_template = find_template("yulan-mini", tokenizer).source
    model = AutoModelForCausalLM.from_pretrained(nano_llama)
    config = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        assistant_only_loss=True,
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )

    def prepare(conversations):
        rows = Dataset.from_list([{"messages": messages} for messages in conversations])
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        return trainer.train_dataset

    return prepare


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json"])
def test_rows_equal_trls(prepare_with_trl, shared, nano_llama, tmp_path, name):
    conversations = list(read_conversations(shared / "data" / name, COLUMNS.get(name, {})))
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = load_tokenizer(nano_llama)
    settings = DataSettings(train=(Source(tmp_path / "rows.jsonl"),), max_tokens=100_000)
    ours = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), 0).train
    theirs = prepare_with_trl(conversations)
    assert len(ours) == len(theirs) == len(conversations) > 80
    different = {
        number
        for key in ("input_ids", "labels")
        for number, pair in enumerate(zip(ours[key], theirs[key], strict=True))
        if pair[0] != pair[1]
    }
    # TRL lets a text that spells a control token become that token.
    assert different == {number for number, messages in enumerate(conversations) if "</s>" in json.dumps(messages)}


def read_conversations(path, columns):
    """Yield the rows that can be trained, as what both are given."""
    for where, raw in read_file(path):
        try:
            row = read_row(choose_format("auto", columns, raw, where), columns, raw, where)
        except DataError:
            continue
        yield [{"role": message["role"], "content": message["content"]} for message in row.messages]
