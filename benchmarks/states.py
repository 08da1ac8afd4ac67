"""Measure how long loading an optimizer state of full width into a model takes, compared with only reading its files.

    python benchmarks/states.py [--folder DIR] [--layers 7] [--repeats 3]

It makes a universal checkpoint of random numbers, with YuLan-Mini's real widths and an eighth of its layers (5.3 GB of weights and
moments). Then it runs the three cases in turn, each in a process of its own: once with the files in the system's cache, and once
without. The time is measured in the process, after its imports. The memory is the peak of the whole process. The benchmark needs 7 GB
of disk and 8 GB of memory, and writes states.md and states.json beside this file.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import initialization

from finetune.training.pretraining.optimizer import OptimizerFactory
from finetune.training.pretraining.state_loading import list_named_parameters, load_parameter
from finetune.yulan.layout import list_native_tensors
from finetune.yulan.native.configuration import YuLanMiniConfig
from finetune.yulan.native.modeling import YuLanMiniForCausalLM
from finetune.yulan.states.optimizer_states import check_parameters, open_states, read_state

READ, LOAD, KIT = "read the files", "torch.load of each", "into a model and its AdamW"
STEP, STATE_FOLDER = 243_198, "global_step243198_universal"
PARTS = ("fp32", "exp_avg", "exp_avg_sq")


def make_config(layers: int) -> YuLanMiniConfig:
    """Return a configuration with the published sizes and the given number of layers."""
    return YuLanMiniConfig(
        num_hidden_layers=layers,
        scale_emb=10.0,
        hidden_states_shrink="muparam",
        dim_model_base_logits=256.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def make_states(folder: Path, layers: int) -> None:
    """Write a universal checkpoint in DeepSpeed's layout, with two parameter groups, if the folder has none yet."""
    if (folder / "latest_universal").is_file():
        return
    shapes = list_native_tensors(make_config(layers).read_native(folder))
    block = torch.randn(99_000 * 1_920, generator=torch.Generator().manual_seed(0)).mul_(0.01)
    root = folder / STATE_FOLDER
    for name, shape in shapes.items():
        parameter = root / "zero" / name
        parameter.mkdir(parents=True, exist_ok=True)
        values = block[: int(torch.Size(shape).numel())].reshape(shape)
        for part in PARTS:
            content = values.square() if part == "exp_avg_sq" else values.clone()
            torch.save({"cat_dim": 0, "param": content}, parameter / f"{part}.pt")
        torch.save(STEP, parameter / "step.pt")
    matrices = {name: torch.Size(shape) for name, shape in shapes.items() if len(shape) == 2}
    others = {name: torch.Size(shape) for name, shape in shapes.items() if len(shape) != 2}
    options = {"betas": (0.9, 0.95), "eps": 1e-15, "step": 0}
    groups = [{**options, "weight_decay": 0.1}, {**options, "weight_decay": 0.0}]
    torch.save({"param_groups": groups}, root / "zero" / "optimizer_state.pt")
    model = {
        "module": {name: block[: shape.numel()].reshape(shape).bfloat16() for name, shape in matrices.items()},
        "param_shapes": [matrices, others],
        "lr_scheduler": {"base_lrs": [1e-2 * 256 / 1920, 1e-2]},
        "global_steps": STEP,
    }
    torch.save(model, root / "mp_rank_00_model_states.pt")
    (folder / "latest_universal").write_text(STATE_FOLDER, encoding="utf-8")


def list_state_files(folder: Path) -> Iterator[Path]:
    """Yield the files of all tensors."""
    yield from (path for part in PARTS for path in sorted((folder / STATE_FOLDER / "zero").glob(f"*/{part}.pt")))


def read_files(folder: Path, layers: int) -> object:
    """Read the files of all tensors into memory, without parsing them."""
    return [path.read_bytes() for path in list_state_files(folder)]


def load_files(folder: Path, layers: int) -> object:
    """Load all tensors with `torch.load`, without checks and without a model."""
    return [torch.load(path, weights_only=True)["param"] for path in list_state_files(folder)]


def load_states(folder: Path, layers: int) -> object:
    """Load weights and moments into a model and its AdamW, as the kit does."""
    with initialization.no_init_weights(), torch.device("meta"):
        model = YuLanMiniForCausalLM(make_config(layers))
    model.to_empty(device="cpu")
    model.tie_weights()
    states = open_states(folder)
    check_parameters(states, model)
    optimizer = OptimizerFactory(states.groups).make(model)
    for name, parameter in list_named_parameters(optimizer):
        load_parameter(optimizer, parameter, read_state(states, name, parameter.shape))
    if len(optimizer.state) != len(states.shapes):
        sys.exit("a parameter has no moments")
    return model, optimizer


WAYS: Mapping[str, Callable[[Path, int], object]] = {READ: read_files, LOAD: load_files, KIT: load_states}


def run_way(name: str, folder: Path, layers: int) -> None:
    """Run one case in this process; print its seconds and the peak memory of the process in bytes."""
    started = time.perf_counter()
    kept = WAYS[name](folder, layers)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps([seconds, peak]))
    del kept


def empty_cache(folder: Path) -> None:
    """Remove the files from the system's page cache."""
    os.sync()
    for path in folder.rglob("*.pt"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_all(folder: Path, layers: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Take every way in turn, from the cache and from the disk."""
    found: dict[str, dict[str, list[float]]] = {name: {"cached": [], "disk": [], "bytes": []} for name in WAYS}
    read_files(folder, layers)
    for number in range(repeats):
        for place in ("cached", "disk"):
            for name in WAYS:
                if place == "disk":
                    empty_cache(folder)
                command = [sys.executable, __file__, "--way", name, "--folder", str(folder), "--layers", str(layers)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr}")
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                found[name][place].append(round(seconds, 2))
                found[name]["bytes"].append(peak)
                print(
                    f"{number + 1}/{repeats}  {place:6}  {name:28} {seconds:6.2f} s {peak / 1e9:6.2f} GB",
                    file=sys.stderr,
                )
    return found


def describe(found: Mapping[str, Mapping[str, Sequence[float]]], layers: int, total: int) -> str:
    """Return the table in Markdown."""
    lines = [
        f"{total / 1e9:.2f} GB of weights and moments ({total // 12:,} parameters: real widths, {layers} layers); {os.cpu_count()} cores "
        f"({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}. Timed after imports, memory of whole "
        f"processes; median (smallest to largest) of {len(found[READ]['cached'])}.",
        "",
        "| | cached, s | x reading | from disk, s | x reading | peak memory, GB | beyond the state, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        cells = []
        for place in ("cached", "disk"):
            seconds, reading = statistics.median(values[place]), statistics.median(found[READ][place])
            cells += [
                f"{seconds:.1f} ({min(values[place]):.1f} to {max(values[place]):.1f})",
                f"{seconds / reading:.2f}",
            ]
        peak = max(values["bytes"])
        lines.append(f"| {name} | {' | '.join(cells)} | {peak / 1e9:.2f} | {(peak - total) / 1e9:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark, or with `--way` one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the states go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.way:
        run_way(arguments.way, arguments.folder, arguments.layers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make_states(folder, arguments.layers)
        total = 12 * sum(
            int(torch.Size(shape).numel())
            for shape in list_native_tensors(make_config(arguments.layers).read_native(folder)).values()
        )
        found = measure_all(folder, arguments.layers, arguments.repeats)
        table = describe(found, arguments.layers, total)
    print(table)
    (arguments.output / "states.md").write_text(table, encoding="utf-8")
    (arguments.output / "states.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
