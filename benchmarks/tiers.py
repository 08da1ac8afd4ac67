"""Write a recipe for each size of GPU, plan it with the real model's sizes, and draw its memory by parts.

    python benchmarks/tiers.py            # recipes/tiers/*.yaml, benchmarks/tiers.json and .png, the table in recipes/README.md

All figures come from plans, so nothing is trained and no GPU is needed. A recipe that does not fit its device is not written.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.check.recipes import load_recipe
from finetune.files.sizes import GIB
from finetune.planning.forecast import Plan, Target, make_plan

ROOT = Path(__file__).parents[1]
TIERS_FOLDER, RESULT = ROOT / "recipes" / "tiers", Path(__file__).with_suffix(".json")
BEGIN, END = "<!-- tiers: written by benchmarks/tiers.py -->", "<!-- /tiers -->"
ACCUMULATION = 16


@dataclass(frozen=True)
class Tier:
    """A device with its memory, and the recipe for it: `model`, `adapter` and `trainer` are YAML, `tokens` is the longest row."""

    name: str
    device: str
    memory_gib: float
    model: str
    adapter: str
    tokens: int
    trainer: str
    is_gpu: bool = True


LORA, FULL = "rank: 16\n  alpha: 32", "kind: none"
CHECKPOINTING, OFFLOADING = (
    "gradient_checkpointing: true",
    "gradient_checkpointing: true\n  activation_offloading: true",
)
TIERS = (
    Tier(
        "4gb",
        "GPU, 4 GB",
        4,
        "quantize: nf4\n  stream_layers: true",
        LORA,
        4096,
        f"learning_rate: 2e-4\n  {CHECKPOINTING}",
    ),
    Tier("6gb", "GPU, 6 GB", 6, "quantize: nf4", LORA, 4096, f"learning_rate: 2e-4\n  {CHECKPOINTING}"),
    Tier("8gb", "GPU, 8 GB", 8, "quantize: nf4", LORA, 28672, f"learning_rate: 2e-4\n  {OFFLOADING}"),
    Tier("12gb", "GPU, 12 GB", 12, "dtype: auto", LORA, 8192, f"learning_rate: 2e-4\n  {CHECKPOINTING}"),
    Tier("16gb", "GPU, 16 GB", 16, "quantize: nf4", LORA, 28672, f"learning_rate: 2e-4\n  {CHECKPOINTING}"),
    Tier(
        "24gb",
        "GPU, 24 GB",
        24,
        "dtype: bfloat16",
        FULL,
        4096,
        f"learning_rate: 1e-5\n  optim: paged_adamw_8bit\n  {CHECKPOINTING}",
    ),
    Tier("80gb", "GPU, 80 GB", 80, "dtype: auto", FULL, 28672, f"learning_rate: 1e-5\n  {CHECKPOINTING}"),
    # Apple's GPU shares the machine's memory, and the system keeps about a quarter of it.
    Tier(
        "apple_16gb",
        "Apple, 16 GB",
        12,
        "dtype: bfloat16",
        LORA,
        2048,
        f"learning_rate: 2e-4\n  {CHECKPOINTING}",
        False,
    ),
    Tier(
        "cpu_16gb",
        "CPU, 16 GB",
        12,
        "quantize: nf4\n  speed: auto",
        LORA,
        1024,
        f"learning_rate: 2e-4\n  {CHECKPOINTING}",
        False,
    ),
)


def write_recipe(tier: Tier) -> str:
    """Return a tier's recipe as text."""
    return f"""# Supervised fine-tuning on a machine of this size; written by benchmarks/tiers.py, and fits by `finetune plan`.
# Needs: {tier.device} (planned, not measured).
#   finetune train tiers/{tier.name} -s data.train=my.jsonl -s output=runs/mine
method: sft
model:
  checkpoint: base
  {tier.model}
data:
  train: ../data/demo.jsonl   # put your own file here
  held_out: 0.05
  max_tokens: {tier.tokens}
  overflow: drop
adapter:
  {tier.adapter}
trainer:
  num_train_epochs: 2
  {tier.trainer}
  lr_scheduler_type: cosine
  warmup_steps: 0.03
  per_device_train_batch_size: 1
  gradient_accumulation_steps: {ACCUMULATION}
"""


def plan_tier(tier: Tier) -> tuple[str, Plan]:
    """Write a tier's recipe; return its text and its plan. Remove the file again if the recipe does not fit the device."""
    path, text = TIERS_FOLDER / f"{tier.name}.yaml", write_recipe(tier)
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path, [] if tier.is_gpu else ["trainer.use_cpu=true"])
    plan = make_plan(recipe, Target(tier.is_gpu, int(tier.memory_gib * GIB)))
    if not plan.fits:
        path.unlink()
        raise SystemExit(
            f"{tier.name}: {plan.peak_bytes / GIB:.2f} GiB do not fit {tier.memory_gib} GiB; lower its tokens"
        )
    return text, plan


def describe_tier(tier: Tier, plan: Plan) -> dict[str, Any]:
    """Return a tier's row of the result, as plain JSON values."""
    trains = "all weights" if tier.adapter == FULL else "LoRA, rank 16"
    base = (
        "4 bits"
        if "nf4" in tier.model
        else "16 bits"
        if "bfloat16" in tier.model or tier.adapter == LORA
        else "32 bits"
    )
    parts = dict(plan.parts)
    return {
        "tier": tier.name,
        "device": tier.device,
        "trains": trains,
        "base": base,
        "tokens": tier.tokens,
        "micro_batch_size": 1,
        "peak_bytes": plan.peak_bytes,
        "memory_bytes": plan.memory_bytes,
        "stage": plan.peak_phase,
        "parts": parts,
    }


def draw_parts(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a stacked bar for each tier: the parts of its peak memory, as shares of the device's memory."""
    groups = {
        "weights": ("weights",),
        "adapter, gradients, optimizer": ("adapter", "gradients", "optimizer"),
        "activations": ("activations",),
        "logits and loss": ("logits",),
        "workspace": ("workspace",),
        "context, rounding, gaps": ("CUDA", "allocator"),
    }
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    names = [f"{row['device']}\n{row['trains'].split(',')[0]}, {row['tokens']:,} tokens" for row in rows]
    for number, (group, prefixes) in enumerate(groups.items()):
        sizes = [sum(size for part, size in row["parts"].items() if part.startswith(prefixes)) for row in rows]
        widths = [100 * size / row["memory_bytes"] for size, row in zip(sizes, rows, strict=True)]
        axes.barh(names, widths, left=left, label=group, color=f"C{number}", height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for index, row in enumerate(rows):
        text = f"{row['peak_bytes'] / GIB:.1f} of {row['memory_bytes'] / GIB:.0f} GiB"
        axes.annotate(text, (left[index], index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(xlabel="share of the device's memory at the peak of a step, %", xlim=(0, 118))
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(path)


def write_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| recipe | trains | base in | longest row | micro-batch | predicted peak | of |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `tiers/{row['tier']}.yaml` | {row['trains']} | {row['base']} | {row['tokens']:,} tokens | {row['micro_batch_size']} row "
        f"| {row['peak_bytes'] / GIB:.2f} GiB | {row['memory_bytes'] / GIB:.0f} GiB |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the recipes, the results, the picture and the table."""
    TIERS_FOLDER.mkdir(exist_ok=True)
    rows = []
    for tier in TIERS:
        text, plan = plan_tier(tier)
        rows.append({**describe_tier(tier, plan), "recipe": text})
        print(f"{tier.name:12} {plan.peak_bytes / GIB:6.2f} of {tier.memory_gib} GiB", flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw_parts(rows, RESULT.with_suffix(".png"))
    readme = ROOT / "recipes" / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{write_table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
