"""Measure `finetune fold` and `finetune export` at full size, and compare them with cp and with PEFT: wall time and peak memory.

    python benchmarks/export.py [--folder DIR] [--layers 56] [--repeats 3]

It makes a random checkpoint with YuLan-Mini's real sizes in both layouts (4.85 GB of bfloat16 as Llama) and a rank-16 adapter on
all linear layers. Then it runs the commands in turn, `repeats` times. The time of a command is that of its process and of a
`sync` after it. The export also runs once more in a process that has loaded the libraries, as a program that trains and exports has
them, and only the export itself is timed there. Memory is the peak resident memory of a process. The benchmark needs 25 GB of disk and 8 GB of memory (for
PEFT), and writes export.md, export.json and export.png beside this file.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import finetune
from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.yulan.folding import list_llama_tensors, write_llama_config
from finetune.yulan.layout import list_native_tensors
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.shards import Piece, TensorSpec, write_shards
from finetune.yulan.tensors import open_tensors
from finetune.yulan.tokenizer_files import copy_tokenizer

SHARD_BYTES = 2 * 10**9
# The system counts the parent's peak memory for a child process too, so a parent without libraries launches each command.
LAUNCHER = """
import json, os, subprocess, sys, time
started = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
os.sync()
print(json.dumps([time.monotonic() - started, usage.ru_maxrss, usage.ru_utime + usage.ru_stime]))
sys.exit(1 if status else 0)
"""
COPY, FOLD, EXPORT, PEFT = "cp", "finetune fold", "finetune export", "PEFT merge and save"
LOADED = "finetune.export(), libraries loaded"


class RandomTensors:
    """Random weights of a usual size, cut from one block; drawing billions of numbers would take longer than the benchmark."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def needs_whole(self, name: str) -> bool:
        """Return False."""
        return False

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Return the rows of a piece; scalars are alphas, and get 1.25, and norms get 1, so that the model does not fade."""
        shape = self.specs[piece.name].shape
        if not shape:
            return torch.tensor(1.25, dtype=torch.bfloat16)
        if "norm" in piece.name:
            return torch.ones(shape, dtype=torch.bfloat16)
        rows = (piece.stop - piece.start, *shape[1:])
        count = rows[0] * (rows[1] if len(rows) > 1 else 1)
        return self.block[:count].reshape(rows)


def make_inputs(folder: Path, layers: int) -> None:
    """Write both checkpoints and the adapter."""
    config = YuLanMiniConfig(
        num_hidden_layers=layers,
        scale_emb=10.0,
        hidden_states_shrink="muparam",
        dim_model_base_logits=256.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    native = config.read_native(folder)
    tokenizer = as_llama(find_checkpoint("nano"))
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {
        "llama": list_llama_tensors(native),
        "native": list_native_tensors(native),
    }
    for name, tensors in shapes.items():
        output = folder / name
        output.mkdir(parents=True, exist_ok=True)
        specs = [TensorSpec(tensor, shape, torch.bfloat16) for tensor, shape in tensors.items()]
        write_shards(output, specs, RandomTensors(specs), SHARD_BYTES)
        copy_tokenizer(tokenizer, output)
    write_llama_config(folder / "llama", native, torch.bfloat16)
    config.save_pretrained(folder / "native")
    make_adapter(folder / "llama", folder / "adapter")


def make_adapter(base: Path, folder: Path) -> None:
    """Write a rank-16 adapter of random numbers in PEFT's format; the model exists only on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
        model.name_or_path = str(base.resolve())
        options = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        tuned = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    names = get_peft_model_state_dict(tuned)
    weights = {name: torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in names.items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tuned.peft_config["default"].save_pretrained(folder)


def merge_by_peft(base: Path, adapter: Path, output: Path) -> None:
    """Merge as PEFT's documentation does."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output, max_shard_size=SHARD_BYTES)
    AutoTokenizer.from_pretrained(base).save_pretrained(output)


def export_loaded(adapter: Path, output: Path, seconds: Path) -> None:
    """Load the libraries, export, and write the seconds of the export and of a `sync` into a file."""
    export = finetune.export  # the kit loads what a function needs when it is first named
    started = time.monotonic()
    export(adapter, output, verify=False)
    os.sync()
    seconds.write_text(str(time.monotonic() - started), encoding="utf-8")


def measure(command: Sequence[str], output: Path) -> tuple[float, int]:
    """Run a command; return its wall time in seconds, including a `sync` of its output, and its peak resident bytes."""
    return measure_all_of(command, output)[:2]


def measure_all_of(command: Sequence[str], output: Path) -> tuple[float, int, float]:
    """Run a command; return its wall time and peak as `measure` does, and the CPU time of its process in seconds."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    launched = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    if launched.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{launched.stderr}")
    seconds, peak, cpu = json.loads(launched.stdout.splitlines()[-1])
    return seconds, peak * (1 if sys.platform == "darwin" else 1024), cpu


def measure_all(folder: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run the commands in turn, so that changes in the machine's speed affect all of them."""
    llama, native, adapter, output = (str(folder / name) for name in ("llama", "native", "adapter", "output"))
    inside = folder / "seconds"
    kit = [sys.executable, "-m", "finetune"]
    commands = {
        COPY: ["cp", "-r", llama, output],
        FOLD: [*kit, "fold", native, "-o", output],
        EXPORT: [*kit, "export", adapter, "-o", output, "--no-verify"],
        LOADED: [sys.executable, __file__, "--loaded", adapter, output, str(inside)],
        PEFT: [sys.executable, __file__, "--peft", llama, adapter, output],
    }
    measure(commands[COPY], folder / "output")  # brings the files into the system's cache
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "bytes": []} for name in commands}
    for number in range(repeats):
        for name, command in commands.items():
            seconds, peak = measure(command, folder / "output")
            if inside.exists():
                seconds = float(inside.read_text(encoding="utf-8"))
                inside.unlink()
            found[name]["seconds"].append(round(seconds, 2))
            found[name]["bytes"].append(peak)
            print(f"{number + 1}/{repeats}  {name:36} {seconds:6.1f} s {peak / 1e9:6.2f} GB", file=sys.stderr)
    return found


def count_equal(folder: Path) -> tuple[int, int, float]:
    """Compare the kit's export with PEFT's; return the number of equal weights, of all weights, and the largest difference."""
    ours, theirs = folder / "output", folder / "peft"
    measure(
        [sys.executable, __file__, "--peft", *(str(folder / name) for name in ("llama", "adapter", "peft"))], theirs
    )
    command = [sys.executable, "-m", "finetune", "export", str(folder / "adapter"), "-o", str(ours), "--no-verify"]
    measure(command, ours)
    first, second = open_tensors(ours), open_tensors(theirs)
    equal, largest = 0, 0.0
    for name in first.names:
        a, b = first.read(name), second.read(name)
        equal += int((a == b).sum())
        largest = max(largest, (a.float() - b.float()).abs().max().item())
    shutil.rmtree(theirs)
    return equal, first.total_bytes // 2, largest


def describe(found: Mapping[str, Mapping[str, Sequence[float]]], total: int, equality: tuple[int, int, float]) -> str:
    """Return the table in Markdown."""
    copy = statistics.median(found[COPY]["seconds"])
    peft_seconds = statistics.median(found[PEFT]["seconds"])
    peft_bytes = max(found[PEFT]["bytes"])
    lines = [
        f"{total / 1e9:.2f} GB of bfloat16 written; {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}, torch {torch.__version__}. Whole processes, each with a `sync` of what it wrote; "
        f"median (smallest to largest) of {len(found[COPY]['seconds'])}.",
        "",
        "| | wall time, s | x cp | x faster than PEFT | peak memory, GB | of PEFT's |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        seconds, peak = statistics.median(values["seconds"]), max(values["bytes"])
        lines.append(
            f"| {name} | {seconds:.1f} ({min(values['seconds']):.1f} to {max(values['seconds']):.1f}) | {seconds / copy:.2f} "
            f"| {peft_seconds / seconds:.2f} | {peak / 1e9:.2f} | {peak / peft_bytes:.2f} |"
        )
    equal, count, largest = equality
    lines += [
        "",
        f"Of {count:,} exported weights {equal:,} equal PEFT's to the last bit (largest difference {largest:.2g}).",
    ]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw two bar charts: wall time and peak memory."""
    figure = Figure(figsize=(9, 3.0), layout="constrained")
    names = list(found)
    colours = ["#9a9a9a", "#1f6f8b", "#1f6f8b", "#1f6f8b", "#c97b3c"]
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("seconds", "bytes"), ("wall time, seconds", "peak memory, GB"), strict=True
    ):
        scale = 1.0 if key == "seconds" else 1e9
        values = [statistics.median(found[name][key]) / scale for name in names]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.1f" if key == "seconds" else "%.2f", padding=3)
        axes.set_xlabel(label)
        axes.set_xlim(0, max(values) * 1.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the benchmark, or one of its own child processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loaded", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peft", nargs=3, type=Path, metavar=("BASE", "ADAPTER", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loaded:
        export_loaded(*arguments.loaded)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.peft:
        merge_by_peft(*arguments.peft)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make_inputs(folder, arguments.layers)
        found = measure_all(folder, arguments.repeats)
        equality = count_equal(folder)
        table = describe(found, open_tensors(folder / "llama").total_bytes, equality)
    print(table)
    (arguments.output / "export.md").write_text(table, encoding="utf-8")
    (arguments.output / "export.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, arguments.output / "export.png")


if __name__ == "__main__":
    main()
