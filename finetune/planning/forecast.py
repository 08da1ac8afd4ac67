"""Forecast a run: whether it fits the memory, which parts take it, and how long a step lasts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from finetune.api_arguments import name_option
from finetune.errors import MachineError, TrainingError, describe_count
from finetune.files.launcher import count_processes
from finetune.files.sizes import GIB
from finetune.models.engine import ENGINES, Engine, check_engine, find_engine
from finetune.planning.changes import Change, apply_change, list_changes
from finetune.planning.duration import CardTime, StepWork, count_streamed_bytes, count_work, estimate_time
from finetune.planning.hardware import (
    CONTEXT_BYTES,
    CUBLAS_BYTES,
    FRAGMENTATION,
    NCCL_BYTES,
    TYPICAL_CARDS,
    UTILISATION,
    Card,
    find_card,
)
from finetune.planning.step.dry_model import read_sizes
from finetune.planning.step.online_step import (
    add_answers,
    as_training_step,
    count_cache_bytes,
    count_judge_bytes,
    count_reference_scorings,
)
from finetune.planning.step.step_memory import STREAMED, StepMemory, measure_step
from finetune.planning.step.step_parts import count_copy_bytes
from finetune.runs.resolved_recipe import ResolvedRecipe

_BAR = 30
EXCHANGE = "NCCL's channels (assumed)"
CONTEXT, ROUNDING, GAPS = "CUDA context and cuBLAS", "allocator rounding", "allocator gaps (assumed)"


@dataclass(frozen=True)
class Target:
    """The device that a plan is made for: a GPU of some memory, a card of the table, or a CPU.

    `memory_bytes` is None where nobody asked whether the run fits. With several processes, each has such a device, and the plan
    is for one of them.
    """

    is_gpu: bool
    memory_bytes: int | None = None
    card: Card | None = None
    engine: Engine = "one"
    processes: int = 1

    def list_changes(self, resolved: ResolvedRecipe) -> Iterator[Change]:
        """Yield the changes that may lower the peak memory of a recipe on this device, in the order in which to try them."""
        return list_changes(resolved, has_gpu=self.is_gpu, can_stream=ENGINES[self.engine].streams_layers)


@dataclass(frozen=True)
class Plan:
    """A forecast; `parts` sum to `peak_bytes`, of which `tensor_bytes` are live tensors, and `times` are estimates.

    `main_memory` is what a run on a GPU keeps in main memory because the recipe moves it there: part -> bytes.
    """

    peak_bytes: int
    tensor_bytes: int
    parts: Mapping[str, int]
    peak_phase: str
    fits: bool | None
    memory_bytes: int | None
    device: str
    trainable_parameters: int
    loss_bytes: int
    engine: Engine
    processes: int
    step: StepWork
    writes_answers: bool
    times: tuple[CardTime, ...]
    suggestions: tuple[str, ...]
    main_memory: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def choose_target(
    resolved: ResolvedRecipe,
    memory_bytes: int | None,
    gpu: str | None,
    engine: Engine | None = None,
    processes: int | None = None,
) -> Target:
    """Return the target of a plan: a GPU, unless the recipe asks for the CPU and no card is named.

    Raises:
        MachineError: no card has that name, or an engine is named without the number of processes.
    """
    engine, processes = _complete_engine(engine, processes)
    card = find_card(gpu) if gpu else None
    memory = memory_bytes if memory_bytes is not None or card is None else card.memory_bytes
    is_gpu = card is not None or not resolved.uses_cpu
    return Target(is_gpu, memory, card, engine, processes)


def _complete_engine(engine: Engine | None, processes: int | None) -> tuple[Engine, int]:
    if engine not in (None, "one") and processes in (None, 1):
        raise MachineError(f"--engine {engine}: say how many processes share the work, such as --processes 2")
    return (engine or "ddp", processes) if processes is not None and processes > 1 else ("one", 1)


def make_plan(resolved: ResolvedRecipe, target: Target) -> Plan:
    """Forecast the memory and the time of a checked recipe's training step, with every row full.

    Raises:
        FinetuneError: the sizes of the base checkpoint cannot be found, or the recipe cannot be trained.
    """
    check_engine(resolved, target.engine)
    has_bf16 = target.card is None or target.card.has_bf16
    trained, sizes = as_training_step(resolved), read_sizes(resolved)
    step = measure_step(trained, target.is_gpu, has_bf16, target.engine, target.processes)
    phase, parts = add_answers(step.peak, count_cache_bytes(resolved, sizes))
    if judge := count_judge_bytes(resolved.recipe):
        parts["judge: its adapter"] = judge
    if target.is_gpu and target.engine == "one" and (copies := count_copy_bytes(resolved, step.trainable)):
        parts["16-bit copies of the adapter"] = copies
    tensor_bytes = sum(parts.values())
    parts |= _list_overheads(step, target.processes) if target.is_gpu else step.main_memory
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
    peak = sum(parts.values())
    fits = None if target.memory_bytes is None else peak <= target.memory_bytes
    scorings = count_reference_scorings(resolved)
    work = count_work(trained, sizes, scorings)
    held, layers = step.main_memory.get(STREAMED, 0), int(sizes["num_hidden_layers"])
    cards = [target.card] if target.card else [find_card(name) for name in TYPICAL_CARDS] if target.is_gpu else []
    return Plan(
        peak_bytes=peak,
        tensor_bytes=tensor_bytes,
        parts=parts,
        peak_phase=phase,
        fits=fits,
        memory_bytes=target.memory_bytes,
        device="gpu" if target.is_gpu else "cpu",
        trainable_parameters=step.trainable,
        loss_bytes=step.loss_bytes,
        engine=target.engine,
        processes=target.processes,
        step=StepWork(
            work.tokens * target.processes,
            work.flops * target.processes,
            count_streamed_bytes(trained, layers, held, scorings) if target.is_gpu else 0,
        ),
        writes_answers=resolved.method.is_online,
        times=tuple(estimate_time(work, card, target.processes) for card in cards),
        suggestions=() if fits else tuple(change.describe() for change in target.list_changes(resolved)),
        main_memory=step.main_memory if target.is_gpu else {},
    )


def _list_overheads(step: StepMemory, processes: int) -> dict[str, int]:
    return {
        **({EXCHANGE: NCCL_BYTES} if processes > 1 else {}),
        CONTEXT: CONTEXT_BYTES + CUBLAS_BYTES,
        ROUNDING: step.peak.rounding,
        GAPS: int(step.peak.bytes * FRAGMENTATION),
    }


@dataclass(frozen=True)
class Step:
    """One change that was made so that a recipe fits; `before` and `after` are the peaks in bytes."""

    change: Change
    before: int
    after: int


def find_fitting_plan(resolved: ResolvedRecipe, target: Target) -> tuple[Plan, tuple[Step, ...]]:
    """Change a recipe until it fits its target; return its plan and the changes.

    Changes that keep the training as it is are tried first. Where nothing fits, the smallest plan is returned.

    Raises:
        MachineError: the target does not say how much memory it has.
    """
    if target.memory_bytes is None:
        raise MachineError(
            f"--fit: say what memory the run has to fit: {name_option('--memory 8GB')}, or {name_option('--gpu NAME')}"
        )
    plan, steps = make_plan(resolved, target), list[Step]()
    while plan.fits is False:
        for change in target.list_changes(resolved):
            changed = apply_change(resolved, change)
            smaller = make_plan(changed, target)
            if smaller.peak_bytes < plan.peak_bytes:
                break
        else:
            break
        steps.append(Step(change, plan.peak_bytes, smaller.peak_bytes))
        resolved, plan = changed, smaller
    return plan, tuple(steps)


def find_target(device: torch.device) -> Target:
    """Return the device of this process as the target of a plan; all processes of a launch get the same answer."""
    engine, processes = find_engine(), count_processes()
    if device.type != "cuda":
        return Target(False, int(psutil.virtual_memory().available) // processes, None, engine, processes)
    if processes > 1:
        cards = range(torch.cuda.device_count())
        memory = min(torch.cuda.get_device_properties(card).total_memory for card in cards)
    else:
        free, _ = torch.cuda.mem_get_info(device)  # asking creates the context, which the plan counts
        memory = int(free) + CONTEXT_BYTES
    return Target(True, memory, None, engine, processes)


def check_fits(resolved: ResolvedRecipe, target: Target) -> Plan:
    """Refuse a run that cannot fit the memory of its target, before anything is loaded; return the plan of one that fits.

    Raises:
        TrainingError: it does not fit; the message names the largest parts and what would take less.
    """
    plan = make_plan(resolved, target)
    if not plan.fits:
        largest = ", ".join(f"{part} {size / 1e9:.2f} GB" for part, size in list(plan.parts.items())[:3])
        raise TrainingError(
            f"{describe_verdict(plan)}; the largest parts are {largest}. It would take less with\n  "
            + "\n  ".join(plan.suggestions)
            + f"\nor run it all the same with {name_option('--force')}"
        )
    return plan


def describe_steps(steps: tuple[Step, ...]) -> str:
    """Return the changes as text, with what each saves; those that alter the training are marked."""
    if not steps:
        return "nothing needs to change"
    lines = ["changes made to fit"]
    for step in steps:
        lines.append(f"  {step.change.describe_effect()}; saves {(step.before - step.after) / 1e9:.2f} GB")
    return "\n".join(lines)


def describe_plan(plan: Plan) -> str:
    """Return the plan as text: a short table with bars, the verdict and the estimates."""
    lines = [f"{'part':<34}{'GB':>8}  share of the peak"]
    for part, size in plan.parts.items():
        share = size / plan.peak_bytes
        if round(share, 3) > 0:
            lines.append(f"{part:<34}{size / 1e9:>8.2f}  {'█' * max(1, round(share * _BAR))} {share:.1%}")
    lines += [
        f"{'peak, in ' + plan.peak_phase:<34}{plan.peak_bytes / 1e9:>8.2f}  of it tensors {plan.tensor_bytes / 1e9:.2f}",
        "",
    ]
    if plan.processes > 1:
        lines.append(f"each of {describe_count(plan.processes, 'process', 'processes')} ({ENGINES[plan.engine].title})")
    lines.append(describe_verdict(plan))
    if plan.main_memory:
        parts = ", ".join(f"{size / 1e9:.2f} GB for {part}" for part, size in plan.main_memory.items())
        lines.append(f"main memory beside it: {parts}")
    if plan.fits is False:
        lines += ["it would take less with", *(f"  {change}" for change in plan.suggestions)]
    lines.append(
        f"one step: {describe_count(plan.step.tokens, 'token')} where every row is full, {plan.step.flops / 1e12:,.0f} TFLOP; "
        f"training {plan.trainable_parameters:,} parameters"
    )
    lines += [
        f"estimate for {time.card}: {_describe_seconds(time.seconds_per_step)} a step, {time.tokens_per_second:,.0f} tokens/s"
        for time in plan.times
    ]
    if plan.times:
        without = "; the time for generating answers is not included" if plan.writes_answers else ""
        if plan.step.streamed_bytes:
            copied = plan.step.streamed_bytes / 1e9
            without += f"; copying {copied:.0f} GB of streamed layers a step is not included, where it takes longer than computing"
        lines.append(f"(estimates: published peak rates x {UTILISATION:.0%}; nothing here was timed{without})")
    return "\n".join(lines)


def describe_verdict(plan: Plan) -> str:
    """Say whether a plan fits, and by how much."""
    peak = f"{plan.peak_bytes / GIB:.2f} GiB"
    if plan.memory_bytes is None:
        return f"needs {peak} of {'GPU' if plan.device == 'gpu' else 'main'} memory"
    memory = f"{plan.memory_bytes / GIB:.2f} GiB"
    if plan.fits:
        return f"fits: {peak} of {memory}, {(plan.memory_bytes - plan.peak_bytes) / GIB:.2f} GiB to spare"
    return f"does not fit: {peak} of {memory}, {(plan.peak_bytes - plan.memory_bytes) / GIB:.2f} GiB too much"


def _describe_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
