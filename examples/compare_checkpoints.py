"""Compare starts before any training: how well does each predict the same held-out answers?

python examples/compare_checkpoints.py rows.jsonl phase5 phase15 phase25 base
"""

import sys
from pathlib import Path

from finetune.evaluate.token_loss import evaluate_path


def main(rows: Path, *names: str) -> None:
    """Print one line for each start; the loss is in nats per token of the answers."""
    print(f"{'start':<20} {'loss':>8} {'perplexity':>12} {'accuracy':>9}")
    for name in names:
        scores = evaluate_path(name, [rows], max_tokens=2048)
        print(f"{name:<20} {scores.loss:>8.3f} {scores.perplexity:>12.2f} {scores.accuracy:>9.1%}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
