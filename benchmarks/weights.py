"""Measure the weights' statistics of `finetune dynamics` at full size, and compare them with reading the same files: time and memory.

    python benchmarks/weights.py [--folder DIR] [--layers 56] [--repeats 2]

It makes a native checkpoint of YuLan-Mini's real sizes from normal random numbers. Matrices of noise are the slowest case: their largest
singular values lie close together. Reading means that every byte goes through a buffer of 4 MB. Both are measured in processes of
their own, without the time of imports, after the system has dropped the files from its cache. CPU time is that of all threads. The benchmark
needs 5 GB of disk, and writes weights.md and weights.json beside this file.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from finetune.checkpoints.finding import find_checkpoint
from finetune.growth.weights.weight_statistics import measure_weights
from finetune.yulan.layout import list_native_tensors
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.shards import Piece, TensorSpec, write_shards
from finetune.yulan.tensors import list_weight_files
from finetune.yulan.tokenizer_files import copy_tokenizer

READ, STATISTICS = "reading the files", "statistics of the weights"
_SHARD_BYTES, _BUFFER_BYTES = 2 * 10**9, 1 << 22


class NoiseTensors:
    """Tensors of normal random numbers in bfloat16, each from a seed of its own; alphas are 1.25, norms 1."""

    def needs_whole(self, name: str) -> bool:
        """Return False: rows do not depend on one another."""
        return False

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Return the rows of a piece."""
        shape = SHAPES[piece.name]
        if not shape:
            return torch.tensor(1.25, dtype=torch.bfloat16)
        if "norm" in piece.name:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(hash((piece.name, piece.start)) % 2**32)
        rows = torch.randn(piece.stop - piece.start, *shape[1:], generator=generator)
        return (rows * 0.02).to(torch.bfloat16)


SHAPES: dict[str, tuple[int, ...]] = {}


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write the random checkpoint."""
    config = YuLanMiniConfig(num_hidden_layers=layers, scale_emb=10.0, tie_word_embeddings=True)
    SHAPES.update(list_native_tensors(config.read_native(folder)))
    folder.mkdir(parents=True)
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in SHAPES.items()]
    write_shards(folder, specs, NoiseTensors(), _SHARD_BYTES)
    config.save_pretrained(folder)
    copy_tokenizer(find_checkpoint("nano"), folder)


def run_one(what: str, folder: Path, output: Path) -> dict[str, float]:
    """Do one of the two in this process, and return wall time, CPU time and the peak of resident memory."""
    wall, cpu = time.monotonic(), time.process_time()
    if what == STATISTICS:
        measure_weights(str(folder), output)
    else:
        buffer = bytearray(_BUFFER_BYTES)
        for file in list_weight_files(folder):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    found = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    return {**found, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def forget(folder: Path) -> None:
    """Drop the files from the system's cache."""
    for file in list_weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(folder: Path, layers: int, repeats: int) -> None:
    """Measure both in turn, and write the table."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        make_checkpoint(checkpoint, layers)
    found: dict[str, list[dict[str, float]]] = {READ: [], STATISTICS: []}
    for number in range(repeats):
        for what, results in found.items():
            forget(checkpoint)
            command = [sys.executable, __file__, "--one", what, str(checkpoint), str(folder / f"out{number}")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(what, results[-1], file=sys.stderr)
    size = sum(file.stat().st_size for file in list_weight_files(checkpoint))
    lines = [
        f"{layers} layers of YuLan-Mini's size, {size / 1e9:.2f} GB of bfloat16; {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}. Best of {repeats} rounds, other programs beside them.",
        "",
        "| | wall time, s | CPU time, s | peak memory, GB |",
        "|---|---|---|---|",
    ]
    best = {
        what: {key: min(one[key] for one in results) for key in ("seconds", "cpu_seconds", "bytes")}
        for what, results in found.items()
    }
    for what, one in best.items():
        lines.append(f"| {what} | {one['seconds']:.1f} | {one['cpu_seconds']:.1f} | {one['bytes'] / 1e9:.2f} |")
    ratio = best[STATISTICS]["seconds"] / best[READ]["seconds"]
    lines += ["", f"The statistics take {ratio:.2f} x the wall time of reading.", ""]
    here = Path(__file__)
    here.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    here.with_suffix(".json").write_text(json.dumps({"bytes": size, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run_one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(chosen.folder or Path(temporary), chosen.layers, chosen.repeats)
