"""Make a random checkpoint of the real sizes in both layouts, and an adapter for it; with --rehearse, of nano's sizes."""

import argparse
import shutil
from pathlib import Path

from export import make_adapter, make_inputs

from finetune.checkpoints.finding import as_llama, find_checkpoint

LAYERS = 56


def main() -> None:
    """Write the folders `llama`, `native` and `adapter`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if not arguments.rehearse:
        make_inputs(arguments.base, LAYERS)
        return
    checkpoint = find_checkpoint("nano")
    shutil.copytree(checkpoint, arguments.base / "native")
    shutil.copytree(as_llama(checkpoint), arguments.base / "llama")
    make_adapter(arguments.base / "llama", arguments.base / "adapter")


if __name__ == "__main__":
    main()
