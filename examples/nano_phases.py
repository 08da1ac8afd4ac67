"""Pre-train `nano` like YuLan-Mini: stable phases in the published proportions, then annealing. Each phase leaves a checkpoint.

python examples/nano_phases.py runs/nano-phases [STEPS]    # steps of each phase; the default is 350

The first phase is twice as long, because it begins with random weights. Every phase reads new texts (made by
recipes/data/corpus.py) and continues from the weights and the optimizer state of the phase before. The folder `model` in its run
directory has the published layout, so it can be trained, folded or exported.
"""

import runpy
import sys
from pathlib import Path

import finetune

# Our phases, each in the proportions of one of YuLan-Mini's 27.
STABLE = {"nano-phase1": "phase1", "nano-phase2": "phase13", "nano-phase3": "phase25"}
ANNEALED = {"nano": "phase27"}
RECIPE = Path(__file__).with_name("nano_phase.yaml")
CORPUS = Path(__file__).parents[1] / "recipes" / "data" / "corpus.py"


def main(output: Path, steps: int) -> None:
    """Train every phase, and print its loss on the held-out texts, which are the same for all phases."""
    corpus = runpy.run_path(str(CORPUS))
    before = None
    for seed, (name, mixture) in enumerate({**STABLE, **ANNEALED}.items(), 1):
        folder = output.resolve() / "corpus" / name
        corpus["write_corpus"](folder, seed)
        settings = [f"output={output / name}", f"data.mixture={mixture}", f"seed={seed}"]
        settings += [f"data.sources.{category}={folder / category}.jsonl" for category in corpus["WRITERS"]]
        settings += [f"data.eval={folder / 'held_out.jsonl'}"]
        if before is None:
            settings += [f"schedule.length={2 * steps}", "schedule.warmup=20"]
        else:
            settings += [f"schedule.length={steps}", f"model.checkpoint={before}", "optimizer.states=published"]
        if name in ANNEALED:
            settings += ["method=anneal", "schedule.decay=1-sqrt", "optimizer.save_states=false"]
        summary = finetune.train(finetune.load_recipe(RECIPE, settings))
        print(f"{name:<12} {summary.steps:>5} steps  held-out loss {summary.eval_loss:.4f}  {summary.seconds:.0f} s")
        before = output.resolve() / name / "model"


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 350)
