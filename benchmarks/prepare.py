"""Compare how fast the kit, TRL and the bare tokenizer prepare rows: rows per second, and peak memory.

    python benchmarks/prepare.py [--rows 100000] [--data FOLDER] [--repeats 1]

The rows come from `gsm8k_train.jsonl`, `alpaca_en_demo.json` and `alpaca_zh_demo.json` in the folder `--data`, repeated up to the
number of rows. Without that folder the benchmark generates rows. The kit and TRL read the same JSON lines file, and render,
tokenize, mask and truncate it. The bare tokenizer gets the rendered texts in one call. Each case runs in a process of its own, and
imports are not timed. With one core the process may use only that core. With two cores TRL's default is still one process. Memory is
the peak of the process and its children, with shared pages counted once. The benchmark writes prepare.md beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

import psutil
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.data.dataset import load_splits
from finetune.data.encoding.rendering import render_conversations
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.settings import DataSettings, Source

SHARED = Path(__file__).parents[2] / "shared" / "data"
MAX_TOKENS = 1024
BARE, KIT, AGAIN, TRL, TRL_TWO = "bare tokenizer", "finetune", "finetune, again", "TRL, its default", "TRL, 2 workers"
WAYS = ((BARE, 1), (KIT, 1), (TRL, 1), (BARE, 2), (KIT, 2), (AGAIN, 2), (TRL, 2), (TRL_TWO, 2))
Measured = dict[tuple[str, int], list[tuple[float, float]]]


def read_conversations(folder: Path, rows: int) -> list[list[dict[str, str]]]:
    """Return conversations from the files of a folder, or generated ones, repeated up to a number of rows."""
    pairs = [(f"What is {i} times {i + 3}?", f"{i} times {i + 3} is {i * (i + 3)}. " * 8) for i in range(2000)]
    if folder.is_dir():
        text = (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8")
        pairs = [(row["question"], row["answer"]) for row in map(json.loads, text.splitlines())]
        for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
            loaded = json.loads((folder / name).read_text(encoding="utf-8"))
            pairs += [(row["instruction"] + "\n" + row["input"], row["output"]) for row in loaded]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs if q and a]
    return list(islice(cycle(turns), rows))


def write_inputs(folder: Path, data: Path, rows: int) -> None:
    """Write the rows, and the texts into which the template renders them."""
    tokenizer = load_tokenizer(as_llama(find_checkpoint("nano")))
    conversations = read_conversations(data, rows)
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = render_conversations(tokenizer, find_template("yulan-mini", tokenizer), conversations).texts
    (folder / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def prepare_rows(name: str, folder: Path) -> float:
    """Prepare the rows as in the case `name`; return the seconds."""
    base = as_llama(find_checkpoint("nano"))
    tokenizer = load_tokenizer(base)
    template = find_template("yulan-mini", tokenizer)
    if name == BARE:
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        return measure_seconds(lambda: tokenizer(texts, add_special_tokens=False))
    rows = folder / "rows.jsonl"
    if name in (KIT, AGAIN):
        settings = DataSettings((Source(rows),), max_tokens=MAX_TOKENS, overflow="truncate", cache=folder / "kit")
        if name == KIT:
            settings = DataSettings(**{**vars(settings), "cache": Path(tempfile.mkdtemp(dir=folder))})
        else:
            load_splits(settings, tokenizer, template, 0)
        return measure_seconds(lambda: load_splits(settings, tokenizer, template, 0).train[0])
    disable_progress_bars()
    disable_progress_bar()
    tokenizer.chat_template = template.source
    model = AutoModelForCausalLM.from_pretrained(base)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        max_length=MAX_TOKENS,
        dataset_num_proc=2 if name == TRL_TWO else None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )

    def prepare() -> None:
        loaded = Dataset.from_json(str(rows), cache_dir=tempfile.mkdtemp(dir=folder))
        SFTTrainer(model=model, args=config, train_dataset=loaded, processing_class=tokenizer)

    return measure_seconds(prepare)


def measure_seconds(work: Callable[[], object]) -> float:
    """Return how many seconds a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def count_memory(process: psutil.Process) -> int:
    """Return the memory of a process and its children in bytes; shared pages count once if the system reports them."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            memory = member.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
        except psutil.Error:
            continue  # the process has ended in the meantime
    return total


def measure_way(name: str, cores: int, folder: Path) -> tuple[float, float]:
    """Run one case in a process of its own; return its seconds and its peak memory in bytes."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--way", name, str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    process = psutil.Process(child.pid)
    if hasattr(process, "cpu_affinity"):
        process.cpu_affinity(process.cpu_affinity()[:cores])
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            peak = max(peak, count_memory(process))
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = child.communicate()
    watcher.join()
    if child.returncode:
        sys.exit(f"{name} failed")
    return float(output.splitlines()[-1]), peak


def describe(found: Measured, rows: int) -> str:
    """Return the table in Markdown."""
    lines = [
        f"{rows:,} rows; {platform.machine()}, Python {platform.python_version()}; median of {len(found[KIT, 1])}.",
        "",
        "| | cores | seconds | rows/s | x TRL's default | x TRL, equal workers | x the bare tokenizer's time | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seconds = {way: statistics.median(second for second, _ in runs) for way, runs in found.items()}
    for (name, cores), runs in found.items():
        time_taken = seconds[name, cores]
        equal = seconds[TRL, 1] if cores == 1 else seconds[TRL_TWO, 2]
        lines.append(
            f"| {name} | {cores} | {time_taken:.2f} | {rows / time_taken:,.0f} | {seconds[TRL, cores] / time_taken:,.2f} "
            f"| {equal / time_taken:,.2f} | {time_taken / seconds[BARE, cores]:.2f} | {max(peak for _, peak in runs) / 1e9:.2f} |"
        )
    return "\n".join(lines) + "\n"


def measure_all(ways: Sequence[tuple[str, int]], folder: Path, repeats: int) -> Measured:
    """Run the cases in turn, so that changes in the machine's speed affect all of them."""
    found: Measured = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            found[way].append(measure_way(*way, folder))
            print(f"{way[0]:18} {way[1]} cores {found[way][-1][0]:7.2f} s", file=sys.stderr)
    return found


def main() -> None:
    """Run all cases and write the table, or with `--way` run one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the table goes")
    parser.add_argument("--way", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.way:
        print(prepare_rows(arguments.way[0], Path(arguments.way[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), arguments.data, arguments.rows)
        table = describe(measure_all(WAYS, Path(folder), arguments.repeats), arguments.rows)
    print(table)
    (arguments.output / "prepare.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
