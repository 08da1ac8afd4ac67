"""Draw the held-out loss and the learning rate over all phases of `nano_phases.py`.

python examples/plot_phases.py runs/nano-phases nano_phases.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

STABLE, ANNEALED, FAINT = "#1f6f8b", "#c8553d", "#8a929c"


def main(folder: Path, file: Path) -> None:
    """Read the logs of the phases in the order of training, and write the picture."""
    runs = sorted(
        (run.parent for run in folder.glob("*/metrics.jsonl")), key=lambda run: (run.name == "nano", run.name)
    )
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    start, joint, ends = 0.0, [], []
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        colour = ANNEALED if run.name == "nano" else STABLE
        length = max(line["num_input_tokens_seen"] for line in lines) / 1000
        held = [
            (start + line["num_input_tokens_seen"] / 1000, line["eval_loss"]) for line in lines if "eval_loss" in line
        ]
        losses.plot(*zip(*joint, *held, strict=True), color=colour, linewidth=2)
        losses.plot(*held[-1], "o", color=colour, markersize=6, clip_on=False)
        losses.annotate(f"{held[-1][1]:.3f}", held[-1], (-4, 14), textcoords="offset points", ha="right", color=colour)
        losses.text(
            start + length / 2, 1.02, run.name, transform=losses.get_xaxis_transform(), ha="center", color=colour
        )
        steps = [
            (start + line["num_input_tokens_seen"] / 1000, line["learning_rate"]) for line in lines if "loss" in line
        ]
        rates.plot(*zip(*steps, strict=True), color=colour, linewidth=2)
        joint, start = [held[-1]], start + length
        ends.append(held[-1][1])
        for axes in (losses, rates):
            axes.axvline(start, color=FAINT, linewidth=0.8, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
    # The loss of the first steps is far higher; with it in the picture the rest would look flat.
    losses.set(ylabel="held-out loss, nats per token", ylim=(0, 2 * ends[0]))
    rates.set(xlabel="thousands of tokens; below, the learning rate", ylabel="rate", ylim=(0, None), xlim=(0, start))
    losses.set_title("A whole YuLan-Mini in miniature", pad=24)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
