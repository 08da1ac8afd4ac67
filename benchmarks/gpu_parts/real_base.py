"""Make a random checkpoint of the real sizes in both layouts, an adapter for it, and rows; with --rehearse, of nano's sizes."""

import argparse
import shutil
from pathlib import Path

from export import make_adapter, make_inputs
from gpu_parts.cases import write_conversations
from gpu_parts.settings import list_settings

from finetune.checkpoints.finding import as_llama, find_checkpoint

LAYERS = 56


def main() -> None:
    """Write the folders `llama`, `native`, `adapter` and, as the last one, `rows`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    base = arguments.base
    shutil.rmtree(base, ignore_errors=True)  # of an earlier call that was stopped
    if arguments.rehearse:
        checkpoint = find_checkpoint("nano")
        shutil.copytree(checkpoint, base / "native")
        shutil.copytree(as_llama(checkpoint), base / "llama")
        make_adapter(base / "llama", base / "adapter")
    else:
        make_inputs(base, LAYERS)
    (base / "new_rows").mkdir()
    for setting in list_settings(arguments.rehearse):
        write_conversations(base / "new_rows" / setting.file, setting, base / "llama")
    (base / "new_rows").rename(base / "rows")


if __name__ == "__main__":
    main()
