"""Compare base checkpoints before any training: measure how well each predicts the same held-out answers.

python examples/compare_checkpoints.py rows.jsonl phase5 phase15 phase25 base
"""

import sys

import finetune


def main(rows: str, *names: str) -> None:
    """Print one line for each checkpoint; the loss is in nats per token of the answers."""
    print(f"{'checkpoint':<20} {'loss':>8} {'perplexity':>12} {'accuracy':>9}")
    for name in names:
        scores = finetune.evaluate(name, rows)
        print(f"{name:<20} {scores.loss:>8.3f} {scores.perplexity:>12.2f} {scores.accuracy:>9.1%}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
