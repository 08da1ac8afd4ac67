"""Micro-annealing in miniature: a candidate that must win, one that must lose and one that changes nothing, five seeds each.

python benchmarks/microanneal.py [FOLDER]    # writes benchmarks/microanneal.json and .md; about 6 CPU minutes

`nano` is pre-trained on web and code texts of recipes/data/corpus.py, with its optimizer states. Then each candidate is half of the tokens of the
annealing of these two. The held-out rows are web, code and mathematics. The winner is mathematics, the loser web texts with the letters of
every word shuffled, and the third one more web and code texts, in their shares.
"""

import argparse
import json
import random
import runpy
import tempfile
from pathlib import Path

import finetune

ROOT = Path(__file__).parents[1]
STEPS, TOKENS, SEEDS = 120, 7_680, 5
HELD_OUT = {"web": 30, "code": 30, "mathematics": 16}
EXPECTED = {"winner": "better", "loser": "worse", "neutral": "no real difference"}


def write_texts(file: Path, texts: list[str]) -> Path:
    """Write a text for each line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return file


def read_texts(file: Path) -> list[str]:
    """Return the texts of a file."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def make_data(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Write the corpus, and return the files of each candidate and the held-out files."""
    write = runpy.run_path(str(ROOT / "recipes" / "data" / "corpus.py"))["write_corpus"]
    for name, seed in (("corpus", 1), ("more", 2)):
        write(folder / name, seed)
    texts, held, start = read_texts(folder / "corpus" / "held_out.jsonl"), [], 0
    for source, count in HELD_OUT.items():
        held.append(write_texts(folder / "held" / f"{source}.jsonl", texts[start : start + count]))
        start += count
    web, code = (read_texts(folder / "more" / f"{name}.jsonl") for name in ("web", "code"))
    garbled = [" ".join("".join(random.Random(word).sample(word, len(word))) for word in text.split()) for text in web]
    candidates = {
        "winner": folder / "corpus" / "mathematics.jsonl",
        "loser": write_texts(folder / "garbled.jsonl", garbled),
        "neutral": write_texts(folder / "neutral.jsonl", web + code),
    }
    return candidates, held


def pretrain(folder: Path) -> Path:
    """Pre-train nano at a stable rate, and return the folder with its weights and optimizer states."""
    output = folder / "stable"
    if not (output / "model").is_dir():
        sources = ", ".join(f"{name}: {folder}/corpus/{name}.jsonl" for name in ("web", "code"))
        settings = [
            f"output={output}",
            f"data.sources={{{sources}}}",
            "data.eval=[]",
            "trainer.eval_strategy=no",
            "answers=0",
        ]
        settings += [f"schedule.length={STEPS}", "schedule.warmup=20"]
        finetune.train(finetune.load_recipe(ROOT / "examples" / "nano_phase.yaml", settings))
    return output / "model"


def main(folder: Path) -> None:
    """Run all, print a line for each, and write the table."""
    candidates, held = make_data(folder)
    start, found = pretrain(folder), []
    for seed in range(1, SEEDS + 1):
        for name, candidate in candidates.items():
            report = finetune.microanneal(
                candidate,
                folder / f"{name}-{seed}",
                start=start,
                tokens=TOKENS,
                share=0.5,
                mixture="phase27",
                held_out=held,
                recipe=ROOT / "recipes" / "anneal_nano.yaml",
                overrides=[
                    *(f"data.sources.{source}={folder}/corpus/{source}.jsonl" for source in ("web", "code")),
                    "optimizer.states=published",
                    "optimizer.save_states=false",
                    "schedule.warmup=0",
                    "trainer.per_device_train_batch_size=4",
                    "answers=0",
                    f"seed={seed}",
                ],
            )
            line = report.deciding
            print(f"{name} {seed}: {report.sentence}", flush=True)
            found.append(
                {
                    "candidate": name,
                    "seed": seed,
                    "lines": [one.to_json() for one in report.lines],
                    "verdict": line.verdict,
                }
            )
    (ROOT / "benchmarks" / "microanneal.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (ROOT / "benchmarks" / "microanneal.md").write_text(tabulate(found), encoding="utf-8")


def tabulate(found: list[dict]) -> str:
    """Return the table of all runs."""
    head = "# Micro-annealing in miniature\n\nWritten by `benchmarks/microanneal.py`, which says what is run.\n\n"
    rows = ["| candidate | seed | change of the held-out loss | p | verdict | by source |", "|---|---|---|---|---|---|"]
    for one in found:
        line = next(line for line in one["lines"] if line["decides"])
        test = line["test"]
        sources = ", ".join(
            f"{other['name']} {other['test']['change']:+.3f}" for other in one["lines"] if not other["decides"]
        )
        change = f"{test['change']:+.4f} ± {test['stderr']:.4f}"
        rows.append(
            f"| {one['candidate']} | {one['seed']} | {change} | {test['p']:.4f} | {one['verdict']} | {sources} |"
        )
    right = {
        name: sum(one["verdict"] == verdict for one in found if one["candidate"] == name)
        for name, verdict in EXPECTED.items()
    }
    counts = "; ".join(f"{name}: {EXPECTED[name]} in {count} of {SEEDS}" for name, count in right.items())
    return head + "\n".join(rows) + f"\n\n{counts}.\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs go (default: a temporary folder)")
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        main((given or Path(temporary)).resolve())
