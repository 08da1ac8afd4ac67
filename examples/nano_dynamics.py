"""Put the phases of `nano_phases.py` side by side: scores with a test of each step, weights, and what each does with a few texts.

python examples/nano_dynamics.py runs/nano-phases [PASSAGES]    # the default is 300

The task is LAMBADA's, with stories of the same kind as those that nano was trained on: the last word must be found. No passage stands in a
training file. The results lie in `dynamics` beside the phases; the same command continues after a stop.
"""

import json
import random
import runpy
import sys
from itertools import islice
from pathlib import Path

import finetune

PHASES = ("nano-phase1", "nano-phase2", "nano-phase3", "nano")
CORPUS = Path(__file__).parents[1] / "recipes" / "data" / "corpus.py"
SEED = "passages"


def write_inputs(folder: Path, count: int) -> tuple[Path, Path]:
    """Write the passages, and the held-out texts with their categories; return both files."""
    corpus = runpy.run_path(str(CORPUS))
    trained = set()
    for file in (folder / "corpus").glob("*/web.jsonl"):
        trained |= {json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()}
    draw, passages = random.Random(SEED), dict[str, None]()
    while len(passages) < count:
        if (text := corpus["write_story"](draw)) not in trained:
            passages[text] = None
    texts = iter(corpus["make_held_out"]())
    sources = {category: list(islice(texts, rows)) for category, rows in corpus["HELD_OUT_ROWS"].items()}
    held_out = [{"text": text, "source": category} for category, rows in sources.items() for text in rows]
    return (
        write_rows(folder / "passages.jsonl", [{"text": text} for text in passages]),
        write_rows(folder / "held_out.jsonl", held_out),
    )


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    """Write one JSON object a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def main(folder: Path, count: int) -> None:
    """Measure the phases, and print the table."""
    passages, texts = write_inputs(folder, count)
    names = [folder / name for name in PHASES]
    found = finetune.dynamics(names, folder / "dynamics", tasks=["lambada"], data=passages, texts=[texts])
    print(found.describe())


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 300)
