"""Describe this machine: its device and memory, what the kit will use on it, and what to install or set."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from transformers.utils import is_flash_attn_2_available

from finetune.errors import MachineError
from finetune.files.cache import examine_cache, find_cache
from finetune.files.sizes import GIB
from finetune.models.loading import check_quantization
from finetune.models.precision import choose_device, choose_precision, find_missing_instructions

# The base checkpoint in 16 bits as published, its folded copy, and an export.
_DISK_BYTES = 15 * 10**9
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Machine:
    """What a run finds on this machine; `memory_bytes` is the device's, `uses` says what `auto` means here."""

    device: str
    name: str
    memory_bytes: int
    free_bytes: int
    devices: int
    cuda: str | None
    driver: str | None
    bf16: bool
    quantization: tuple[str, ...]
    attention: tuple[str, ...]
    uses: dict[str, str]
    cache: str
    cache_free_bytes: int
    cached_folders: int
    damaged: tuple[str, ...]
    advice: tuple[str, ...]


def examine_machine() -> Machine:
    """Examine the device that a run would choose, what can run on it, and the disk of the cache."""
    device = choose_device()
    quantization = tuple(name for name in ("nf4", "int8") if _can_quantize(name, device))
    attention = ("sdpa", "eager", *(("flash_attention_2",) if is_flash_attn_2_available() else ()))
    memory, free = _read_memory(device)
    cache, cached = find_cache(), examine_cache()
    disk = _read_free_disk(cache)
    lora, full = (choose_precision("auto", device, trains_all) for trains_all in (False, True))
    has_bf16 = lora.weights == torch.bfloat16  # `auto` chooses bfloat16 wherever the device has it
    uses = {
        "dtype for adapters": _NAMES[lora.weights],
        "dtype for training all weights": f"{_NAMES[full.weights]}, computing in {'float32' if full.autocast == 'no' else full.autocast}",
        "attention": "flash or memory-efficient kernels, by torch" if device.type == "cuda" else "torch's own",
    }
    return Machine(
        device=device.type,
        name=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        memory_bytes=memory,
        free_bytes=free,
        devices=max(torch.cuda.device_count(), 1),
        cuda=torch.version.cuda,
        driver=_read_driver() if device.type == "cuda" else None,
        bf16=has_bf16,
        quantization=quantization,
        attention=attention,
        uses=uses,
        cache=str(cache),
        cache_free_bytes=disk,
        cached_folders=len(cached),
        damaged=tuple(f"{folder}: {damage}" for folder, found in cached.items() for damage in found),
        advice=tuple(_list_advice(device, quantization, has_bf16, disk)),
    )


def _can_quantize(name: str, device: torch.device) -> bool:
    try:
        check_quantization(name, device)
    except MachineError:
        return False
    return True


def _read_memory(device: torch.device) -> tuple[int, int]:
    """Return total and free bytes of the device; Apple's GPU shares the machine's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total), int(free)
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _read_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None where `nvidia-smi` does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _read_free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _list_advice(device: torch.device, quantization: tuple[str, ...], has_bf16: bool, disk: int) -> list[str]:
    advice = []
    if device.type == "cpu":
        advice.append(
            "torch finds no GPU: `finetune demo` and nano run here, the real base model would need days; "
            "with an NVIDIA card install its driver and torch's CUDA build: https://pytorch.org/get-started"
        )
        if find_missing_instructions(device) is None:
            advice.append("this processor multiplies in bfloat16, in less than half of the time: set model.speed: auto")
    if device.type == "cuda" and not has_bf16:
        advice.append("this card has no bfloat16: runs use float16, which skips steps when gradients overflow")
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        advice.append(
            "several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml -m finetune train RECIPE; "
            "use fsdp2.yaml there to shard what one GPU cannot hold"
        )
        if not find_spec("deepspeed"):
            advice.append("recipes/accelerate/zero2.yaml and zero3.yaml need DeepSpeed: pip install deepspeed")
    if device.type == "cuda" and not is_flash_attn_2_available():
        advice.append(
            "torch's own flash kernel is used; after pip install flash-attn, model.speed: auto tries that one, and model.attention: "
            "flash_attention_2 uses it"
        )
    if device.type == "cuda" and not find_spec("liger_kernel"):
        advice.append("model.speed: auto tries fused kernels too after pip install liger-kernel")
    if "nf4" not in quantization:
        advice.append(
            "model.quantize: nf4 does not run here; pip install bitsandbytes helps on NVIDIA GPUs and CPUs, else use sft_lora"
        )
    if device.type == "cuda" and not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):
        advice.append("export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True reduces fragmentation of GPU memory")
    if disk < _DISK_BYTES:
        advice.append(
            f"the cache's disk has {disk / 1e9:.1f} GB free; the base checkpoint, its folded copy and an export take {_DISK_BYTES / 1e9:.0f} GB: "
            "set FINETUNE_CACHE and HF_HOME to a larger disk"
        )
    command = "finetune plan RECIPE --memory 8GB" if device.type == "cpu" else "finetune plan RECIPE"
    advice.append(f"see what fits: {command}")
    return advice


def describe_machine(machine: Machine) -> str:
    """Return the report as text for a person."""
    lines = [
        f"device        {machine.device}: {machine.name}" + (f" x {machine.devices}" if machine.devices > 1 else ""),
        f"memory        {machine.memory_bytes / GIB:.1f} GiB, {machine.free_bytes / GIB:.1f} free",
        f"CUDA          {machine.cuda or 'not in this build of torch'}"
        + (f", driver {machine.driver}" if machine.driver else ""),
        f"bfloat16      {'yes' if machine.bf16 else 'no'}",
        f"quantization  {', '.join(machine.quantization) or 'none'}",
        f"attention     {', '.join(machine.attention)}",
        f"cache         {machine.cache}, {machine.cache_free_bytes / 1e9:.0f} GB free, {machine.cached_folders} folders, "
        + ("all as they were written" if not machine.damaged else f"{len(machine.damaged)} damaged"),
        *(f"  {line}; it is made again when it is needed" for line in machine.damaged),
        "",
        "what `auto` becomes here",
        *(f"  {key}: {value}" for key, value in machine.uses.items()),
        "",
        "advice",
        *(f"  {line}" for line in machine.advice),
    ]
    return "\n".join(lines)
