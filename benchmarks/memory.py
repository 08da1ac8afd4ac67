"""Compare the memory that a plan predicts for a training step with the resident memory of a real run on the CPU. Linux only.

    python benchmarks/memory.py [--repeats 1]

The model is a random Llama of width 512 with 8 layers. Each recipe trains two steps on rows of 2,048 tokens in a process of its
own. The benchmark compares the growth of the process during the training. Weights and adapter are in memory before, and a small run
has imported the modules that Python loads late. It writes memory.md beside this file.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from finetune.check.recipes import load_recipe
from finetune.files.resources import list_recipes
from finetune.planning.step.step_memory import measure_step
from finetune.planning.step.step_parts import ADAPTER

# With shorter rows the memory of Python and the C library would hide that of a step.
TOKENS = 2048
LORA = ("sft_lora", "adapter.train_tokens=[]", "trainer.gradient_accumulation_steps=1")
FULL = ("sft_full", "trainer.optim=adamw_torch", "model.dtype=auto")
KEEPS = "trainer.gradient_checkpointing=false"
CASES = {
    "LoRA": LORA,
    "LoRA, keeps activations": (*LORA, KEEPS),
    "nf4": (*LORA, "model.quantize=nf4"),
    "nf4, keeps activations": (*LORA, "model.quantize=nf4", KEEPS),
    "all weights": (*FULL, "trainer.gradient_accumulation_steps=1"),
    "all weights, accumulated": (*FULL, "trainer.gradient_accumulation_steps=2"),
    "packed": (*LORA, "trainer.packing=true", KEEPS),
    "DPO": ("dpo_lora", "adapter.train_tokens=[]", "trainer.gradient_accumulation_steps=1"),
}
# The weights are mapped from their file, and their pages count as resident only after they were read, so the child reads them all
# first. Writing to `clear_refs` resets the peak.
CHILD = """
import ctypes, gc, sys
from pathlib import Path
from finetune.check.recipes import load_recipe
from tests.planning.conftest import build_real_trainer

def read(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

recipe, *overrides = sys.argv[1:]
build_real_trainer(load_recipe(Path(recipe), [*overrides, "model.checkpoint=nano", "data.max_tokens=64"])).train()
trainer = build_real_trainer(load_recipe(Path(recipe), overrides))
for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
    tensor.detach().float().sum()
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = read("VmRSS")
trainer.train()
print(read("VmHWM") - before)
"""


def save_base_checkpoint(folder: Path) -> None:
    """Write the random Llama that the recipes train."""
    config = LlamaConfig(
        vocab_size=6000,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure_growth(recipe: Path, overrides: list[str]) -> int:
    """Train in a new process; return by how many bytes it grows."""
    # Without this setting the C library keeps freed memory, and tensors of many sizes leave gaps in it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(recipe), *overrides]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Plan and measure every case, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the table goes")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{platform.machine()}, Python {platform.python_version()}; median of {arguments.repeats}.",
        "",
        "| | planned growth, MB | resident growth, MB | difference |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_base_checkpoint(Path(folder) / "base")
        for case, (name, *overrides) in CASES.items():
            overrides += [f"model.checkpoint={folder}/base", f"output={folder}/run", f"data.max_tokens={TOKENS}"]
            recipe = list_recipes()[name]
            peak = measure_step(load_recipe(recipe, overrides), is_gpu=False).peak
            there = sum(size for part, size in peak.parts.items() if part.startswith(("weights", ADAPTER)))
            planned = peak.bytes - there
            grown = statistics.median(measure_growth(recipe, overrides) for _ in range(arguments.repeats))
            lines.append(f"| {case} | {planned / 1e6:.1f} | {grown / 1e6:.1f} | {grown / planned - 1:+.1%} |")
            print(lines[-1], file=sys.stderr)
    table = "\n".join(lines) + "\n"
    print(table)
    (arguments.output / "memory.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
