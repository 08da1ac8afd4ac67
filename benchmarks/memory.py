"""Predicted memory against what a real CPU run takes: the tracker's peak of live tensors, and the process's resident memory.

    python benchmarks/memory.py           # about a minute a row; writes benchmarks/memory.json and prints the table

Resident memory is what it grows by while two steps are trained, with weights and adapter there before. Linux only.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from finetune.check import load_recipe
from finetune.plan.memory import measure_step
from finetune.plan.stages import ADAPTER
from finetune.resources import list_recipes

LORA = ("sft_lora", "adapter.train_tokens=[]", "trainer.gradient_accumulation_steps=1")
KEEPS = "trainer.gradient_checkpointing=false"
CASES = {
    "lora": LORA,
    "lora, keeps activations": (*LORA, KEEPS),
    "nf4": (*LORA, "model.quantize=nf4"),
    "nf4, keeps activations": (*LORA, "model.quantize=nf4", KEEPS),
    "full": ("sft_full", "trainer.optim=adamw_torch", "model.dtype=auto", "trainer.gradient_accumulation_steps=1"),
    "full, accumulated": (
        "sft_full",
        "trainer.optim=adamw_torch",
        "model.dtype=auto",
        "trainer.gradient_accumulation_steps=2",
    ),
    "packed": (*LORA, "trainer.packing=true", KEEPS),
    "dpo": (*LORA, "method=dpo", KEEPS),
}
SIZES = {"512 wide, 8 layers": (512, 8), "384 wide, 6 layers": (384, 6)}
# Small steps would drown in what Python and the C library take for themselves.
TOKENS = 2048
CHILD = """
import json, sys
from pathlib import Path
from finetune.check import load_recipe
from finetune.plan.stages import WORKSPACE, follow_training
from finetune.plan.tracker import MemoryTracker
from tests.plan.conftest import build_real_trainer
trainer = build_real_trainer(load_recipe(Path(sys.argv[2]), sys.argv[3:]))
read = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
if sys.argv[1] == "tracker":
    tracker = MemoryTracker()
    follow_training(trainer, tracker)
    print(tracker.find_peak(WORKSPACE).bytes)
else:
    before = read("VmRSS")
    trainer.train()
    print(read("VmHWM") - before)
"""


def save_start(folder: Path, width: int, layers: int) -> None:
    """Write a random Llama of a size."""
    heads = width // 64
    config = LlamaConfig(
        vocab_size=6000,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(kind: str, name: str, overrides: list[str]) -> int:
    """Train in a process of its own and return bytes."""
    # Otherwise the C library keeps what was freed, and tensors of many sizes leave gaps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, kind, name, *overrides]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Measure every case at both sizes."""
    rows = []
    for size, (width, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_start(Path(folder), width, layers)
            for case, (name, *overrides) in CASES.items():
                overrides += [f"model.checkpoint={folder}", f"output={folder}/run", f"data.max_tokens={TOKENS}"]
                peak = measure_step(load_recipe(list_recipes()[name], overrides), is_gpu=False).peak
                there = sum(bytes for part, bytes in peak.parts.items() if part.startswith(("weights", ADAPTER)))
                tracked, resident = (measure(kind, name, overrides) for kind in ("tracker", "resident"))
                row = {"size": size, "case": case, "predicted": peak.bytes, "tracked": tracked}
                row |= {"predicted_growth": peak.bytes - there, "resident_growth": resident}
                rows.append(row)
                print(
                    f"{size:20} {case:26} predicted {peak.bytes / 1e6:8.1f} MB, tracker {peak.bytes / tracked - 1:+.2%}; "
                    f"growth {row['predicted_growth'] / 1e6:8.1f} MB, resident {resident / row['predicted_growth'] - 1:+.1%}",
                    flush=True,
                )
                Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
