"""Prepare rows with the kit, with TRL, and with the bare tokenizer, side by side in one process; print a table.

    python benchmarks/prepare.py [--rows 100000] [--data FOLDER]

Without the folder of real files, rows are generated. Each contender prepares the same rows from the same JSON lines file.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from finetune.data.dataset import load_splits
from finetune.data.settings import DataSettings, Source
from finetune.data.template import find_template, render_conversations
from finetune.data.tokenizer import load_tokenizer
from finetune.starts import as_llama, find_checkpoint

_SHARED = Path(__file__).parents[2] / "shared" / "data"
_MAX_TOKENS = 1024


def read_conversations(folder: Path, rows: int) -> list[list[dict[str, str]]]:
    """Return conversations of real files, repeated to a number of rows."""
    pairs = [(f"What is {i} times {i + 3}?", f"{i} times {i + 3} is {i * (i + 3)}. " * 8) for i in range(2000)]
    if folder.is_dir():
        text = (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8")
        pairs = [(row["question"], row["answer"]) for row in map(json.loads, text.splitlines())]
        for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
            loaded = json.loads((folder / name).read_text(encoding="utf-8"))
            pairs += [(row["instruction"] + "\n" + row["input"], row["output"]) for row in loaded]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs if q and a]
    return list(islice(cycle(turns), rows))


def measure(work: Callable[[], Any]) -> float:
    """Return seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepare_with_trl(model: Any, tokenizer: Any, file: Path, workers: int | None) -> SFTTrainer:
    """Let TRL read and prepare the file as its trainer does."""
    config = SFTConfig(
        output_dir=str(file.parent / "trl"),
        assistant_only_loss=True,
        max_length=_MAX_TOKENS,
        dataset_num_proc=workers,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    rows = Dataset.from_json(str(file), cache_dir=tempfile.mkdtemp(dir=file.parent))
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data", type=Path, default=_SHARED)
    arguments = parser.parse_args()
    disable_caching()
    base = as_llama(find_checkpoint("nano"))
    tokenizer = load_tokenizer(base)
    template = find_template("yulan-mini", tokenizer)
    tokenizer.chat_template = template.source
    model = AutoModelForCausalLM.from_pretrained(base)
    conversations = read_conversations(arguments.data, arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)
        file.write_text("".join(lines), encoding="utf-8")
        settings = DataSettings(
            (Source(file),), max_tokens=_MAX_TOKENS, overflow="truncate", cache=Path(folder) / "cache"
        )
        texts = render_conversations(tokenizer, template, conversations).texts
        results = {}
        for name, is_parallel in (("one thread", "false"), ("all cores", "true")):
            os.environ["TOKENIZERS_PARALLELISM"] = is_parallel
            results[f"bare tokenizer, {name}"] = measure(lambda: tokenizer(texts, add_special_tokens=False))
            cached = DataSettings(**{**vars(settings), "cache": Path(folder) / name})
            results[f"kit, {name}"] = measure(lambda cached=cached: load_splits(cached, tokenizer, template, 0))
            again = lambda cached=cached: load_splits(cached, tokenizer, template, 0).train[0]  # noqa: E731
            results[f"kit again, {name}"] = measure(again)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for workers in (None, 2):
            name = f"TRL, {'its default' if workers is None else f'{workers} workers'}"
            results[name] = measure(lambda workers=workers: prepare_with_trl(model, tokenizer, file, workers))
        print(f"{'':32}{'seconds':>9}{'rows/s':>10}{'x TRL':>8}")
        for name, seconds in results.items():
            ratio = results["TRL, its default"] / seconds
            print(f"{name:32}{seconds:9.2f}{arguments.rows / seconds:10,.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
