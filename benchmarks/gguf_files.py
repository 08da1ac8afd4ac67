"""Measure `finetune gguf` at full size, and compare it with a plain NumPy quantization of the same rows: time, memory, size.

    python benchmarks/gguf_files.py [--folder DIR] [--layers 56] [--repeats 3] [--type q8_0]

It writes a random checkpoint with YuLan-Mini's real sizes (4.85 GB of bfloat16) and converts it, without and with reading the file
back. The plain quantization reads the same rows on all cores, makes Q8_0 of them by its formula, and writes nothing. The wall time of
a command is that of its process and of a `sync` after it; the CPU time is that of its process, and says more where the machine does
other work. The benchmark needs 10 GB of disk, and writes gguf_files.md and gguf_files.json beside this file. (A file `gguf.py` here
would hide the package of that name.)
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from export import SHARD_BYTES, RandomTensors, measure_all_of

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.yulan.folding import list_llama_tensors, write_llama_config
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.shards import TensorSpec, write_shards
from finetune.yulan.tensors import open_tensors
from finetune.yulan.tokenizer_files import copy_tokenizer

WRITE, PROVE, PLAIN = "finetune gguf --no-verify", "finetune gguf, read back", "NumPy, nothing written"
ROWS = 128


def make_model(folder: Path, layers: int) -> None:
    """Write the checkpoint, with nano's tokenizer."""
    config = YuLanMiniConfig(num_hidden_layers=layers, rms_norm_eps=1e-6, tie_word_embeddings=False)
    native = config.read_native(folder)
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in list_llama_tensors(native).items()]
    write_shards(folder, specs, RandomTensors(specs), SHARD_BYTES)
    copy_tokenizer(as_llama(find_checkpoint("nano")), folder)
    write_llama_config(folder, native, torch.bfloat16)


def quantize_plainly(folder: Path) -> None:
    """Make Q8_0 of all matrices: blocks of 32 values share the scale max|x| / 127."""
    tensors = open_tensors(folder)
    torch.set_num_threads(1)

    def work(piece: tuple[str, int, int]) -> int:
        blocks = tensors.read_rows(*piece).float().numpy().reshape(-1, 32)
        scale = numpy.abs(blocks).max(axis=1, keepdims=True) / numpy.float32(127)
        inverse = numpy.divide(1, scale, where=scale > 0, out=numpy.zeros_like(scale))
        quotients = blocks * inverse
        sizes = numpy.abs(quotients)
        whole = numpy.floor(sizes)
        # Halves are rounded away from zero, as the format's own function does; numpy.rint rounds them to even.
        values = (numpy.sign(quotients) * (whole + numpy.floor(2 * (sizes - whole)))).astype(numpy.int8)
        return scale.astype(numpy.float16).nbytes + values.nbytes

    pieces = [
        (name, start, min(start + ROWS, tensors.shape(name)[0]))
        for name in tensors.names
        if len(tensors.shape(name)) == 2
        for start in range(0, tensors.shape(name)[0], ROWS)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        print(sum(executor.map(work, pieces)))


def main() -> None:
    """Run the benchmark, or with `--plain` only the plain quantization."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--plain", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        quantize_plainly(arguments.plain)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / "model"
        make_model(folder, arguments.layers)
        output = folder.parent / "out" / "model.gguf"
        convert = [sys.executable, "-m", "finetune", "gguf", str(folder), "-o", str(output), "--type", arguments.type]
        commands = {
            WRITE: [*convert, "--no-verify"],
            # Not the command: where a binding is installed it also runs the model in float32, which needs 10 GB.
            PROVE: [sys.executable, "-c", READ_BACK, str(folder), str(output), arguments.type],
            PLAIN: [sys.executable, __file__, "--plain", str(folder)],
        }
        found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in commands}
        size = 0
        for number in range(arguments.repeats):
            for name, command in commands.items():
                seconds, peak, cpu = measure_all_of(command, output.parent)
                size = output.stat().st_size if output.exists() else size
                found[name].append((round(seconds, 2), peak, round(cpu, 2)))
                print(
                    f"{number + 1}/{arguments.repeats}  {name:28} {seconds:6.1f} s {cpu:6.1f} s of CPU {peak / 1e9:6.2f} GB",
                    file=sys.stderr,
                )
        table = describe(found, open_tensors(folder).total_bytes, size, arguments.type)
    print(table)
    (arguments.output / "gguf_files.md").write_text(table, encoding="utf-8")
    (arguments.output / "gguf_files.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


READ_BACK = """
import sys
from pathlib import Path
from finetune.exporting.gguf.conversion import convert_folder
convert_folder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def describe(found: dict[str, list[tuple[float, int, float]]], total: int, size: int, kind: str) -> str:
    """Return the table in Markdown."""
    plain, plain_cpu = _take_medians(found[PLAIN])
    lines = [
        f"{total / 1e9:.2f} GB of bfloat16 to {size / 1e9:.2f} GB of {kind}; {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}, NumPy {numpy.__version__}. Whole processes, each with a `sync` of what it wrote; median "
        f"(smallest to largest) of {len(found[PLAIN])}. Load of the machine in the last 15 minutes: {os.getloadavg()[2]:.1f}.",
        "",
        "| | wall time, s | x plain NumPy | CPU time, s | x plain NumPy | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        times = [seconds for seconds, _, _ in runs]
        wall, cpu = _take_medians(runs)
        lines.append(
            f"| {name} | {wall:.1f} ({min(times):.1f} to {max(times):.1f}) | {wall / plain:.2f} | {cpu:.1f} | {cpu / plain_cpu:.2f} "
            f"| {max(peak for _, peak, _ in runs) / 1e9:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _take_medians(runs: list[tuple[float, int, float]]) -> tuple[float, float]:
    """Return the median wall time and the median CPU time."""
    return statistics.median(seconds for seconds, _, _ in runs), statistics.median(cpu for _, _, cpu in runs)


if __name__ == "__main__":
    main()
