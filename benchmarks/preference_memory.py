"""Compare the peak memory of DPO with an adapter with that of SFT on the same tokens, and of TRL's DPO with a second model.

    python benchmarks/preference_memory.py [--tokens 256] [--repeats 1]

The model is a Llama of 213 million random parameters in float32 with an adapter of rank 16. Each case trains two steps on the CPU in
a process of its own, with gradient checkpointing (the default). A step has one pair of two texts; in SFT it has two texts. The figure
is the peak memory of the process, minus its memory after the imports. On Linux each case is measured with two settings of the
allocator. In the first, glibc returns every freed block of 64 KB and more to the system, so that the figure is the memory in use. The
second is glibc's default, which keeps several hundred megabytes of freed blocks. In the case with a second model DPOTrainer gets a
reference model of its own. Otherwise it takes the trained model with its adapter switched off. The benchmark needs 4 GB of memory, and
writes preference_memory.md beside this file.
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
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from finetune.check.recipes import resolve_names
from finetune.models.lora import attach_adapter
from finetune.models.precision import Precision
from finetune.planning.step.dry_model import make_full_rows, make_stand_in_tokenizer
from finetune.recipe.sections import AdapterSection, DataSection, Recipe
from finetune.training.trainer import build_trainer

SFT, DPO, TWO_MODELS = "SFT of the same tokens", "DPO", "DPO, a reference model of its own"
WAYS = (SFT, DPO, TWO_MODELS)
GOALS = {SFT: 1.15, TWO_MODELS: 0.6}
SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 1_024,
    "intermediate_size": 2_816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
}
# Setting of the allocator -> environment variables for glibc.
ALLOCATORS = {"in use": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "as the system counts": {}}
# ru_maxrss is in bytes on macOS and in kilobytes on Linux.
PEAK_UNIT = 1 if platform.system() == "Darwin" else 1024


def make_model() -> LlamaForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def read_peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


def measure_way(way: str, tokens: int) -> dict[str, int]:
    """Train two steps of one case; return the growth of the peak memory in bytes, and the number of parameters."""
    before = read_peak()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            method="sft" if way == SFT else "dpo",
            data=DataSection(max_tokens=tokens),
            adapter=AdapterSection(rank=16),
            output=folder,
            trainer={
                "max_steps": 2,
                "per_device_train_batch_size": 2 if way == SFT else 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
            },
        )
        model: PreTrainedModel | PeftModel = make_model()
        parameters = model.num_parameters()
        model = attach_adapter(model, recipe.adapter, Path(folder))
        resolved, precision = resolve_names(recipe), Precision(torch.float32, "no")
        trainer = build_trainer(resolved, model, make_stand_in_tokenizer(), make_full_rows(resolved), precision)
        if way == TWO_MODELS:
            trainer.ref_model = make_model().eval().requires_grad_(False)
            add_fused_lm_head(trainer.ref_model)
        trainer.train()
    return {"bytes": read_peak() - before, "parameters": parameters}


def run_way(way: str, allocator: str, tokens: int) -> dict[str, int]:
    """Measure one case in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--tokens", str(tokens), "--way", way]
    environment = {**os.environ, **ALLOCATORS[allocator]}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    found: dict[str, int] = json.loads(output.splitlines()[-1])
    return found


def describe(found: dict[tuple[str, str], list[dict[str, int]]], tokens: int) -> str:
    """Return the table in Markdown."""
    runs = next(iter(found.values()))
    peaks = {key: statistics.median(run["bytes"] for run in runs) for key, runs in found.items()}
    lines = [
        f"{runs[0]['parameters']:,} parameters in float32, an adapter of rank 16, two texts of {tokens} tokens a step; {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}. Peak of the whole process less its imports; median of {len(runs)}.",
        "",
        "| | " + "".join(f"{allocator}, GB | DPO's is this much of it | " for allocator in ALLOCATORS) + "goal |",
        "|---|" + "---|---|" * len(ALLOCATORS) + "---|",
    ]
    for way in WAYS:
        cells = [
            f"{peaks[way, allocator] / 1e9:.2f} | {peaks[DPO, allocator] / peaks[way, allocator]:.2f}"
            for allocator in ALLOCATORS
        ]
        lines.append(f"| {way} | {' | '.join(cells)} | {f'<= {GOALS[way]}' if way in GOALS else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every case in turn, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the table goes")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure_way(arguments.way, arguments.tokens)))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    keys = [(way, allocator) for way in WAYS for allocator in ALLOCATORS]
    found: dict[tuple[str, str], list[dict[str, int]]] = {key: [] for key in keys}
    for _ in range(arguments.repeats):
        for way, allocator in keys:
            found[way, allocator].append(run_way(way, allocator, arguments.tokens))
            print(
                f"{way:<36}{allocator:<22}{found[way, allocator][-1]['bytes'] / 1e9:6.2f} GB",
                file=sys.stderr,
                flush=True,
            )
    table = describe(found, arguments.tokens)
    print(table)
    (arguments.output / "preference_memory.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
