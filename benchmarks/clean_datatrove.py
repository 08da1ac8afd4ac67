"""Find near-duplicates of the same generated rows by `finetune clean`, by the pipeline that it emits, and by datatrove's own MinHash.

    python benchmarks/clean_datatrove.py --python PYTHON [--rows 20000]

PYTHON is that of an environment with datatrove, such as the one that `python tests/runtimes/environments.py datatrove` builds; what it
lacks is taken from the kit's environment. Each program uses one process, groups of three words and 16 bands of 8 hashes. datatrove's
own MinHash cuts words at spaces here, because its tokenizers of words are packages of their own. Seconds are those of the processor,
imports included. The benchmark writes clean_datatrove.md beside this file.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

MEBI = 2**20
RECIPE = "model: {checkpoint: nano}\ndata: {train: rows.jsonl, max_tokens: 100000}\nclean: {near_duplicates: {threshold: 0.8}}\n"


def run_datatrove(folder: Path) -> None:
    """Run datatrove's own four steps of MinHash over the answers; this is called in datatrove's environment."""
    dedup = importlib.import_module("datatrove.pipeline.dedup")
    words = importlib.import_module("datatrove.utils.word_tokenizers").WordTokenizer
    hashing = importlib.import_module("datatrove.utils.hashing").HashConfig
    config = importlib.import_module("datatrove.pipeline.dedup.minhash").MinhashConfig(
        3, 16, 8, hash_config=hashing(precision=32)
    )
    reader = importlib.import_module("datatrove.pipeline.readers").JsonlReader
    writer = importlib.import_module("datatrove.pipeline.writers").JsonlWriter
    executor = importlib.import_module("datatrove.executor").LocalPipelineExecutor

    class Spaces(words):  # type: ignore[misc, valid-type]
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = word_tokenize

    sign = dedup.MinhashDedupSignature(f"{folder / 'own'}/signatures", config, language=Spaces())
    # datatrove 0.10.1 hands texts to xxhash, which takes bytes only since version 4.
    digest = importlib.import_module("xxhash").xxh32_intdigest
    sign._hash_func = lambda text: digest(text.encode())
    rows = reader(str(folder), text_key="completion", glob_pattern="rows.jsonl")
    work = folder / "own"
    steps = (
        [rows, sign],
        [dedup.MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)],
        [dedup.MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config)],
        [rows, dedup.MinhashDedupFilter(f"{work}/remove"), writer(f"{work}/rows", compression=None)],
    )
    for number, step in enumerate(steps):
        tasks = config.num_buckets if number == 1 else 1
        executor(step, tasks=tasks, workers=1, logging_dir=f"{work}/logs/{number}").run()


def measure(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its seconds of the processor, and the memory of its largest process in bytes."""
    paths = [str(Path(__file__).parents[1]), sysconfig.get_path("purelib")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit((folder / "log").read_text()[-2000:])
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def count_rows(folder: Path) -> int:
    """Return the lines of all JSON lines files under a folder."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in folder.rglob("*.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_datatrove(arguments.inside)
        return
    write_generated = importlib.import_module(
        "clean"
    ).write_generated  # it imports the kit, which datatrove's part does not need
    finetune, python = [sys.executable, "-m", "finetune"], str(arguments.python)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_generated(folder / "rows.jsonl", arguments.rows)
        (folder / "recipe.yaml").write_text(RECIPE)
        measure([*finetune, "clean", "recipe.yaml", "--emit", "datatrove", "-o", "pipeline.py"], folder)
        file = folder / "pipeline.py"
        file.write_text(file.read_text().replace("WORKERS = -1", "WORKERS = 1"))
        found = {
            "datatrove's own MinHash": (
                *measure([python, __file__, "--inside", name], folder),
                folder / "own" / "rows",
            ),
            "`finetune clean`": (*measure([*finetune, "clean", "recipe.yaml", "-o", "out"], folder), folder / "out"),
            "the emitted pipeline": (*measure([python, str(file)], folder), folder / "pipeline-rows"),
        }
        text = f"{platform.machine()}, Python {platform.python_version()}. {arguments.rows:,} generated rows of about 500 tokens.\n\n"
        text += "| program | rows that stay | s of CPU | rows a second of CPU | peak, MiB |\n|---|---|---|---|---|\n"
        for program, (seconds, peak, rows) in found.items():
            text += f"| {program} | {count_rows(rows):,} | {seconds:.1f} | {arguments.rows / seconds:,.0f} | {peak / MEBI:,.0f} |\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(json.dumps(text) if not sys.stdout.isatty() else text)


if __name__ == "__main__":
    main()
