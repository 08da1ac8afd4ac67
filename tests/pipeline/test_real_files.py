"""`finetune init` on real files: a recipe that trains two steps, or one clear reason.

A few of the files are tried; `FINETUNE_ALL_CASES=1` tries all of them.
"""

import json
import os
from dataclasses import dataclass

import pytest

from finetune.check.recipes import load_recipe
from finetune.cli.main import main
from finetune.training.run import run_training

TRIES_ALL = os.environ.get("FINETUNE_ALL_CASES") == "1"
SHORT = (
    "answers=0",
    "row_losses=0",
    "data.held_out=0",
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "trainer.disable_tqdm=true",
)


@dataclass(frozen=True)
class Trained:
    """A file that can be trained: its method, the format of its rows and their number."""

    path: str
    method: str
    format: str
    rows: int
    is_quick: bool = False


TRAINED = (
    Trained("data/identity.json", "sft", "alpaca", 91),
    Trained("data/alpaca_en_demo.json", "sft", "alpaca", 999),
    Trained("data/alpaca_zh_demo.json", "sft", "alpaca", 1000),
    Trained("data/c4_demo.jsonl", "sft", "text", 300),
    Trained("data/dpo_en_demo.json", "dpo", "sharegpt_preference", 300),
    Trained("data/kto_en_demo.json", "kto", "labelled_messages", 300),
    Trained("data/glaive_toolcall_en_demo.json", "sft", "sharegpt", 300),
    Trained("cases/rows/bom_crlf.jsonl", "sft", "messages", 4),
    Trained("cases/rows/dsdict", "sft", "messages", 8),
    Trained("cases/rows/hermes.jsonl", "sft", "sharegpt", 4),
    Trained("cases/rows/legacy_fc.jsonl", "sft", "messages", 4),
    Trained("cases/rows/long.csv", "sft", "alpaca", 2),
    Trained("cases/rows/rows.tsv", "sft", "prompt_completion", 1, is_quick=True),
    Trained("cases/rows/toolargs_struct.parquet", "sft", "messages", 4),
    Trained("cases/pairs/hh.jsonl", "dpo", "preference", 12, is_quick=True),
    Trained("cases/pairs/kto5.jsonl", "kto", "labelled", 5),
    Trained("cases/pairs/lf_output_list.json", "dpo", "preference", 12),
    Trained("cases/pairs/orca_prompt.jsonl", "dpo", "preference", 12),
)
REFUSED = {
    "data/gsm8k_train.jsonl": "line 1: the keys question, answer fit no format",
    "data/HumanEval.jsonl.gz": "its rows are prompts without answers",
    "cases/rows/bigint.jsonl": "line 1: holds a number of more digits than Python reads",
    "cases/rows/gbk.csv": "line 2: is not UTF-8 text",
    "cases/rows/mixed.jsonl": "line 4: has no 'messages'",
    "cases/rows/reasoning.jsonl": "message 2 has 'reasoning_content', which the chat template does not render there",
    "cases/rows/same_speaker.jsonl": "message 2 is of the user; turns must alternate",
    "cases/rows/tool_nan.jsonl": "line 1: holds a number that is no JSON, such as NaN or Infinity",
    "cases/rows/weight_half.jsonl": "weight of message 2 is 0.5",
    "cases/pairs/orca.jsonl": "has no question before its answers",
}


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, nano_llama):
    """Return a function that runs `finetune init` on a file; it gives exit status, output and error output."""
    monkeypatch.chdir(tmp_path)

    def run(file):
        with pytest.raises(SystemExit) as ended:
            main(["init", "--data", str(file), "--base", "nano", "--device", "cpu", "-o", "mine.yaml", "--json"])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


@pytest.mark.parametrize("case", [case for case in TRAINED if TRIES_ALL or case.is_quick], ids=lambda case: case.path)
def test_a_real_file_gets_a_recipe_that_trains(call, shared, tmp_path, case):
    status, output, _ = call(shared / case.path)
    written = json.loads(output)
    assert (status, written["method"], written["format"], written["rows"]) == (0, case.method, case.format, case.rows)
    assert run_training(load_recipe(tmp_path / "mine.yaml", SHORT)).steps == 2


@pytest.mark.parametrize("path", REFUSED)
def test_a_file_that_cannot_be_trained_gets_one_reason(call, shared, tmp_path, path):
    status, output, error = call(shared / path)
    assert (status, output) == (2, "") and REFUSED[path] in error
    assert not (tmp_path / "mine.yaml").exists() and "Traceback" not in error
