"""Answer the question before a run: does it fit, what takes the room, and how long will it take."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.plan.dry_model import read_sizes
from finetune.plan.duration import CardTime, StepWork, count_work, estimate_time
from finetune.plan.hardware import (
    CONTEXT_BYTES,
    CUBLAS_BYTES,
    FRAGMENTATION,
    GIB,
    TYPICAL_CARDS,
    UTILISATION,
    Card,
    find_card,
)
from finetune.plan.memory import StepMemory, measure_step
from finetune.recipe import Recipe

_BAR = 30
CONTEXT, ROUNDING, GAPS = "CUDA context and cuBLAS", "allocator rounding", "allocator gaps (assumed)"


@dataclass(frozen=True)
class Target:
    """What is planned for: a GPU of some memory, a card of the table, or a CPU; no memory means that none was asked for."""

    is_gpu: bool
    memory_bytes: int | None = None
    card: Card | None = None


@dataclass(frozen=True)
class Plan:
    """A forecast: `parts` sum to `peak_bytes`, of which `tensor_bytes` are live tensors; times are estimates."""

    peak_bytes: int
    tensor_bytes: int
    parts: Mapping[str, int]
    peak_stage: str
    fits: bool | None
    memory_bytes: int | None
    device: str
    trainable_parameters: int
    loss_bytes: int
    step: StepWork
    times: tuple[CardTime, ...]
    suggestions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def choose_target(recipe: Recipe, memory_bytes: int | None, gpu: str | None) -> Target:
    """Return what a recipe is planned for; a GPU, unless the recipe itself asks for the CPU.

    Raises:
        MachineError: no card has that name.
    """
    card = find_card(gpu) if gpu else None
    memory = memory_bytes if memory_bytes is not None or card is None else card.memory_bytes
    is_gpu = card is not None or not recipe.trainer.get("use_cpu")
    return Target(is_gpu, memory, card)


def make_plan(recipe: Recipe, target: Target) -> Plan:
    """Forecast the memory and the time of a checked recipe's training steps, every row full.

    Raises:
        FinetuneError: the start's sizes cannot be found, or the recipe cannot be trained.
    """
    step = measure_step(recipe, target.is_gpu, target.card is None or target.card.has_bf16)
    parts = {**step.peak.parts, **(_list_overheads(step) if target.is_gpu else {})}
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
    peak = sum(parts.values())
    fits = None if target.memory_bytes is None else peak <= target.memory_bytes
    work = count_work(recipe, read_sizes(recipe.model.checkpoint), read_batch(recipe), read_accumulation(recipe))
    cards = [target.card] if target.card else [find_card(name) for name in TYPICAL_CARDS] if target.is_gpu else []
    return Plan(
        peak_bytes=peak,
        tensor_bytes=step.peak.bytes,
        parts=parts,
        peak_stage=step.peak.stage,
        fits=fits,
        memory_bytes=target.memory_bytes,
        device="gpu" if target.is_gpu else "cpu",
        trainable_parameters=step.trainable,
        loss_bytes=step.loss_bytes,
        step=work,
        times=tuple(estimate_time(work, card) for card in cards),
        suggestions=() if fits else tuple(suggest_changes(recipe, parts)),
    )


def _list_overheads(step: StepMemory) -> dict[str, int]:
    return {
        CONTEXT: CONTEXT_BYTES + CUBLAS_BYTES,
        ROUNDING: step.peak.rounding,
        GAPS: int(step.peak.bytes * FRAGMENTATION),
    }


def read_batch(recipe: Recipe) -> int:
    """Return the rows that a device computes at once."""
    return int(recipe.trainer.get("per_device_train_batch_size", 8))


def read_accumulation(recipe: Recipe) -> int:
    """Return the batches of one optimizer step."""
    return int(recipe.trainer.get("gradient_accumulation_steps", 1))


def suggest_changes(recipe: Recipe, parts: Mapping[str, int]) -> list[str]:
    """Return what would take less room, the changes that leave the result as it is first."""
    batch, trainer = read_batch(recipe), recipe.trainer
    changes = []
    if batch > 1:
        changes.append(
            f"trainer.per_device_train_batch_size=1 with trainer.gradient_accumulation_steps="
            f"{batch * read_accumulation(recipe)}: the same steps, a batch at a time"
        )
    if not trainer.get("gradient_checkpointing", True):
        changes.append("trainer.gradient_checkpointing=true: keeps one tensor a layer, computes the rest again")
    elif not trainer.get("activation_offloading"):
        changes.append("trainer.activation_offloading=true: what is kept between layers waits in the host's memory")
    if recipe.adapter.kind == "none" and "8bit" not in str(trainer.get("optim", "")):
        changes.append("trainer.optim=paged_adamw_8bit: optimizer states in 8 bits, in the host's memory when need be")
    if recipe.adapter.train_tokens:
        changes.append("adapter.train_tokens=[]: no copies of the tables, no gradient of the head")
    if recipe.adapter.kind == "lora" and recipe.model.quantize == "none":
        changes.append("model.quantize=nf4: linear layers in 4 bits")
    if recipe.adapter.kind == "none":
        changes.append("adapter.kind=lora with model.quantize=nf4: trains an adapter instead of all weights")
    changes.append(f"data.max_tokens={max(recipe.data.max_tokens // 2, 256)}: shorter rows")
    return changes


def describe_plan(plan: Plan) -> str:
    """Return the plan as a short table with bars, the verdict and the estimates."""
    lines = [f"{'part':<34}{'GB':>8}  share of the peak"]
    for part, size in plan.parts.items():
        share = size / plan.peak_bytes
        if round(share, 3) > 0:
            lines.append(f"{part:<34}{size / 1e9:>8.2f}  {'█' * max(1, round(share * _BAR))} {share:.1%}")
    lines += [
        f"{'peak, in ' + plan.peak_stage:<34}{plan.peak_bytes / 1e9:>8.2f}  of it tensors {plan.tensor_bytes / 1e9:.2f}",
        "",
    ]
    lines.append(_describe_verdict(plan))
    if plan.fits is False:
        lines += ["it would take less with", *(f"  {change}" for change in plan.suggestions)]
    lines.append(
        f"one step: {plan.step.tokens:,} tokens where every row is full, {plan.step.flops / 1e12:,.0f} TFLOP; "
        f"training {plan.trainable_parameters:,} parameters"
    )
    lines += [
        f"estimate for {time.card}: {_describe_seconds(time.seconds_per_step)} a step, {time.tokens_per_second:,.0f} tokens/s"
        for time in plan.times
    ]
    if plan.times:
        lines.append(f"(estimates: published peak rates x {UTILISATION:.0%}; nothing here was timed)")
    return "\n".join(lines)


def _describe_verdict(plan: Plan) -> str:
    peak = f"{plan.peak_bytes / GIB:.2f} GiB"
    if plan.memory_bytes is None:
        return f"needs {peak} of {'GPU' if plan.device == 'gpu' else 'main'} memory"
    memory = f"{plan.memory_bytes / GIB:.2f} GiB"
    if plan.fits:
        return f"fits: {peak} of {memory}, {(plan.memory_bytes - plan.peak_bytes) / GIB:.2f} GiB to spare"
    return f"does not fit: {peak} of {memory}, {(plan.peak_bytes - plan.memory_bytes) / GIB:.2f} GiB too much"


def _describe_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
