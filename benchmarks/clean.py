"""Plant faults of 12 kinds in real rows, clean them, and count what each step finds; measure near-duplicates on many rows.

    python benchmarks/clean.py [--data FOLDER] [--each 40] [--rows 1000000]

The rows are the first of `gsm8k_train.jsonl`, `alpaca_en_demo.json` and `alpaca_zh_demo.json` in the folder `--data`; without that
folder nothing is planted. First the rows are cleaned alone, so that what they hold themselves counts as no mistake of a step. Then
faults of each kind are planted, and the rows are cleaned again. The second part generates `--rows` rows of about 500 tokens, a tenth of
them near-duplicates, and cleans them with `near_duplicates` alone, in a process of its own; `--rows 0` leaves it out. The benchmark writes clean.md beside this file.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from finetune.check.recipes import load_recipe
from finetune.cleaning.clean_run import clean_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
SEED, GIBI = 11, 2**30
# `too_long` is planted above this; no row of the files is as long.
MAX_TOKENS = 4096
RULES = "too_long, mojibake, control_token, other_language, repeated_punctuation, one_word"
Row = dict[str, str]


def spoil_text(row: Row, faulty: str) -> Row:
    """Return a row with another answer."""
    return {**row, "completion": faulty}


# Each kind with the step that must find it, and how a good row is spoilt; a row that is text stands as it is in the file.
KINDS: dict[str, tuple[str, Callable[[Row, random.Random], Row | str]]] = {
    "broken JSON": ("unreadable", lambda row, draw: json.dumps(row)[:-3]),
    "empty answer": ("unreadable", lambda row, draw: spoil_text(row, "  ")),
    "wrong answer": ("verify", lambda row, draw: {**row, "truth": "-1"}),
    "too long": ("rules", lambda row, draw: spoil_text(row, "word and more " * MAX_TOKENS)),
    "wrong encoding": (
        "rules",
        lambda row, draw: spoil_text(row, "微软公司的产品很好用。".encode().decode("latin-1") + row["completion"]),
    ),
    "control token": ("rules", lambda row, draw: spoil_text(row, row["completion"] + " <|eot_id|> and so on")),
    "other language": (
        "rules",
        lambda row, draw: {
            **row,
            "prompt": "What do you think about the weather on this long day?",
            "completion": "我觉得今天的天气非常好，我们可以一起出去散步。",
        },
    ),
    "repeated punctuation": ("rules", lambda row, draw: spoil_text(row, "It is so!!!!!!!!!! " + row["completion"])),
    "one word": ("rules", lambda row, draw: spoil_text(row, "Certainly")),
    "exact duplicate": ("exact_duplicates", lambda row, draw: row),
    "near duplicate": ("near_duplicates", lambda row, draw: change_word(row, draw)),
    "of the evaluation set": ("decontaminate", lambda row, draw: {**row}),
}
# The values that turn a step off.
OFF = {"rules": "[]", "exact_duplicates": "false", "near_duplicates": "{}", "decontaminate": "{}", "verify": "{}"}
STEPS = ("unreadable", "rules", "exact_duplicates", "near_duplicates", "decontaminate", "verify")


def change_word(row: Row, draw: random.Random) -> Row:
    """Replace one word of the answer."""
    words = row["completion"].split(" ")
    words[draw.randrange(len(words))] = "indeed"
    return spoil_text(row, " ".join(words))


def read_rows(folder: Path, count: int) -> list[Row]:
    """Return rows with a question and an answer, the same number from each file."""
    lines = (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in map(json.loads, lines[:count])]
    for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
        for row in json.loads((folder / name).read_text(encoding="utf-8"))[:count]:
            rows.append({"prompt": f"{row['instruction']}\n{row['input']}".strip(), "completion": row["output"]})
    return rows


def clean(folder: Path, lines: list[str], held: list[Row]) -> tuple[dict[int, str], dict[str, int]]:
    """Clean lines of a file; return the step by which each line left, by its number from 1, and the rows of each step."""
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{checkpoint: nano}}\ndata: {{train: rows.jsonl, max_tokens: {MAX_TOKENS}}}\n"
        f"clean: {{unreadable: true, rules: [{RULES}], exact_duplicates: true, near_duplicates: {{threshold: 0.8}}, "
        "decontaminate: {against: held.jsonl}, verify: {answers: true, truth: truth}}\n",
        encoding="utf-8",
    )
    # The examples of a report are the first five only; what stays says which lines left, and each step is run alone to say by which.
    left: dict[int, str] = {}
    for step in range(len(STEPS)):
        output = folder / f"out{time.monotonic_ns()}"
        off = [f"clean.{name}={OFF[name]}" for name in STEPS[step + 1 :]]
        report = clean_rows(load_recipe(recipe, off), output)
        kept = {
            json.loads(line)["provenance"]["line"]
            for line in (output / "rows.jsonl")
            .read_text(encoding="utf-8")
            .rstrip("\n")
            .split("\n")  # other ends of lines belong to texts
        }
        for number in range(1, len(lines) + 1):
            if number not in kept:
                left.setdefault(number, STEPS[step])
    return left, {step.name: step.dropped for step in report.steps}


def measure_faults(folder: Path, each: int) -> list[tuple[str, str, int, int, int]]:
    """Return for each kind its step, how many were planted, found by their step, and found by another; then rows lost without a fault."""
    draw = random.Random(SEED)
    good = read_rows(folder, 400)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        own, _ = clean(work, [json.dumps(row) for row in good], [{"prompt": "nothing"}])
        good = [row for number, row in enumerate(good, 1) if number not in own]
        held = [good.pop(draw.randrange(len(good))) for _ in range(3 * each)]
        held = [row for row in held if len(row["prompt"].split()) >= 15][:each]
        # Not a copy of a row that stays: a step before would find it.
        sums = [row for row in good if "####" in row["completion"]][:each]
        good = [row for row in good if row not in sums]
        fresh = {"of the evaluation set": held, "wrong answer": sums}
        # A word changes a share of a long answer only, and a short one is not compared.
        long = [row for row in good if len(row["completion"].split(" ")) >= 45]
        lines = [(json.dumps(row), "") for row in good]
        for kind, (_, spoil) in KINDS.items():
            basis = fresh.get(kind) or draw.sample(long if "duplicate" in kind else good, each)
            for row in basis:
                made = spoil(row, draw)
                lines.append((made if isinstance(made, str) else json.dumps(made), kind))
        first = lines[: len(good)]
        later = lines[len(good) :]
        draw.shuffle(later)
        lines = first + later
        left, _ = clean(work, [text for text, _ in lines], held)
    planted, found, elsewhere = Counter[str](), Counter[str](), Counter[str]()
    for number, (_, kind) in enumerate(lines, 1):
        planted[kind] += 1
        if number in left:
            (found if kind and left[number] == KINDS[kind][0] else elsewhere)[kind] += 1
    rows = [(kind, step, planted[kind], found[kind], elsewhere[kind]) for kind, (step, _) in KINDS.items()]
    return [*rows, ("(rows without a fault)", "none", planted[""], found[""], elsewhere[""])]


def write_generated(file: Path, rows: int) -> None:
    """Write rows of about 500 tokens; every tenth is an earlier one with a few other words."""
    draw = random.Random(SEED)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    kept: list[list[str]] = []
    with file.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            text = draw.choices(words, k=330)
            if number % 10 == 9:
                text = list(draw.choice(kept))
                text[draw.randrange(len(text))] = "changed"
            elif len(kept) < 1000:
                kept.append(text)
            stream.write(json.dumps({"prompt": f"Row {number}?", "completion": " ".join(text)}) + "\n")


def measure_memory(rows: int) -> None:
    """Clean generated rows in this process, and print rows that left, seconds, those of the CPU, and the peak memory as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_generated(folder / "rows.jsonl", rows)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            "model: {checkpoint: nano}\ndata: {train: rows.jsonl, max_tokens: 100000}\nclean: {near_duplicates: {threshold: 0.8}}\n"
        )
        resolved = load_recipe(recipe)
        before, start, busy = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            time.perf_counter(),
            time.process_time(),
        )
        report = clean_rows(resolved, folder / "out")
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "left": report.steps[0].dropped,
        "seconds": seconds,
        "busy": busy,
        "before": before * 1024,
        "peak": peak * 1024,
    }
    print(json.dumps(found))


def describe_memory(rows: int) -> str:
    """Measure in a process of its own, and return a sentence."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", str(rows)], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return (
        f"\n{rows:,} generated rows, `near_duplicates` alone: {found['left']:,} left, {found['busy']:,.0f} s of CPU "
        f"({rows / found['busy']:,.0f} rows a second of CPU), peak memory {found['peak'] / GIBI:.2f} GiB, of which the libraries "
        f"{found['before'] / GIBI:.2f} GiB.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of)
        return
    text = f"{platform.machine()}, Python {platform.python_version()}.\n"
    if arguments.data.is_dir():
        text += "\n| planted | step | rows | left by this step | by another | recall |\n|---|---|---|---|---|---|\n"
        *kinds, (_, _, good, _, lost) = measure_faults(arguments.data, arguments.each)
        for kind, step, planted, found, elsewhere in kinds:
            text += f"| {kind} | `{step}` | {planted:,} | {found:,} | {elsewhere:,} | {found / planted:.3f} |\n"
        taken = sum(found + elsewhere for *_, found, elsewhere in kinds)
        text += f"\n{lost:,} of {good:,} rows without a fault left; precision of all steps together {taken / (taken + lost):.3f}.\n"
    if arguments.rows:
        text += describe_memory(arguments.rows)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
