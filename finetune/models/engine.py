"""Find and set up the engine by which the processes of `accelerate launch` share a run: whole copies, or sharded tensors."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from finetune.api_arguments import name_option
from finetune.compat import shard_on_cpu
from finetune.errors import MachineError, RecipeError, TrainingError
from finetune.files.launcher import count_processes
from finetune.models.engines.zero_stage import list_contradictions, read_stage
from finetune.runs.resolved_recipe import ResolvedRecipe

Engine = Literal["one", "ddp", "fsdp2", "zero2", "zero3"]


@dataclass(frozen=True)
class EngineKind:
    """What is special about an engine: its name for a person, whether it shards the weights, and whether DeepSpeed runs it.

    `streams_layers` says whether a run with it can keep its layers in main memory.
    """

    title: str
    shards_weights: bool = False
    is_deepspeed: bool = False
    streams_layers: bool = False


ENGINES: Mapping[Engine, EngineKind] = {
    "one": EngineKind("one process", streams_layers=True),
    "ddp": EngineKind("DDP"),
    "fsdp2": EngineKind("FSDP2", shards_weights=True),
    "zero2": EngineKind("ZeRO-2", is_deepspeed=True),
    "zero3": EngineKind("ZeRO-3", shards_weights=True, is_deepspeed=True),
}
ZERO_STAGES: Mapping[int, Engine] = {2: "zero2", 3: "zero3"}
# What gloo and NCCL say of a connection whose other end is gone.
_LOST = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "ncclRemoteError")
_CONFIG = "in accelerate's configuration; see recipes/accelerate/fsdp2.yaml"


def find_engine() -> Engine:
    """Return the engine that this process was launched with.

    Raises:
        MachineError: the kit does not support the engine, or one of its settings.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):  # it also shards the work of one process, to main memory
        return ZERO_STAGES[read_stage()]
    if count_processes() == 1:
        return "one"
    if _is_on("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise MachineError(f"FSDP 1 is not supported; set fsdp_version: 2 {_CONFIG}")
        if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise MachineError(
                "every process must load the whole base model before it keeps its share; "
                f"set fsdp_cpu_ram_efficient_loading: false {_CONFIG}"
            )
        return "fsdp2"
    return "ddp"


def check_engine(resolved: ResolvedRecipe, engine: Engine) -> None:
    """Check that an engine can train a recipe, before anything is loaded.

    Raises:
        RecipeError: it cannot; the message names the keys to change.
    """
    recipe, kind = resolved.recipe, ENGINES[engine]
    problems = list(list_contradictions()) if kind.is_deepspeed and engine == find_engine() else []
    if kind.shards_weights and recipe.adapter.train_tokens:
        problems.append(
            f"adapter.train_tokens: PEFT replaces rows of whole embedding tables, and {kind.title} shards them; "
            "set train_tokens: [], or launch with recipes/accelerate/ddp.yaml"
        )
    if kind.shards_weights and recipe.adapter.modules_to_save:
        problems.append(
            f"adapter.modules_to_save: PEFT copies whole modules, and {kind.title} shards them; "
            "set modules_to_save: [], or launch with recipes/accelerate/ddp.yaml"
        )
    if kind.shards_weights and recipe.model.quantize == "int8":
        problems.append("model.quantize: int8 weights cannot be sharded; set nf4 or none")
    if recipe.model.stream_layers and not kind.streams_layers:
        problems.append(
            f"model.stream_layers: layers are streamed in one process only, and this is {kind.title}; remove this key, or start the run "
            "without a launcher"
        )
    if kind.shards_weights and recipe.rewards.judge.run:
        problems.append(
            f"rewards.judge.run: the judge needs the whole base model, and {kind.title} shards it; "
            "launch with recipes/accelerate/ddp.yaml"
        )
    if engine == "fsdp2" and "bit" in str(recipe.trainer.get("optim", "")):
        problems.append(
            f"trainer.optim: {recipe.trainer['optim']} cannot step sharded tensors; set adamw_torch, whose moments can be sharded"
        )
    if resolved.method.is_pretraining and kind.is_deepspeed:
        problems.append(
            f"method: {recipe.method} uses an optimizer of its own, which DeepSpeed would replace; launch with "
            "recipes/accelerate/fsdp2.yaml"
        )
    if engine == "fsdp2" and recipe.optimizer.moments != "float32":
        problems.append(
            f"optimizer.moments: moments of the kind {recipe.optimizer.moments} cannot be sharded; set float32"
        )
    if problems:
        raise RecipeError(f"under {kind.title}", problems)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def check_launch_precision(autocast: str) -> None:
    """Check that accelerate's `mixed_precision` leaves the dtype to the recipe, whose autocast dtype is `no`, `bf16` or `fp16`.

    Raises:
        MachineError: it names another dtype, which would be trained with.
    """
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ("no", autocast):
        wanted = "float32" if autocast == "no" else autocast
        raise MachineError(
            f"mixed_precision in accelerate's configuration is {said}, but this recipe's model.dtype computes in {wanted}; "
            "set mixed_precision: 'no', so that the recipe decides"
        )


def describe_idle_gpus(device: torch.device) -> str | None:
    """Return a sentence about visible GPUs that this process leaves unused, or None."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2 or count_processes() > 1:
        return None
    return (
        f"{count} GPUs are visible, and this run uses one of them, {device}; to use all, set num_processes: {count} in "
        "recipes/accelerate/ddp.yaml and run: accelerate launch --config_file recipes/accelerate/ddp.yaml -m finetune train RECIPE"
    )


def let_cpu_shard(config: TrainingArguments) -> None:
    """Let FSDP2 shard on the CPU too, where this process was launched with it."""
    if find_engine() == "fsdp2" and config.device.type == "cpu":
        shard_on_cpu("bf16" if config.bf16 else "fp16" if config.fp16 else "no")


@contextlib.contextmanager
def load_whole(config: TrainingArguments) -> Iterator[None]:
    """Let every process load whole weights inside this context; the engine takes its shares of them when training begins.

    Under ZeRO-3 transformers would partition them while it loads, so that nothing before step 1 could read a tensor, and would
    refuse to load them onto a GPU.
    """
    if config.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        config.deepspeed_plugin.set_deepspeed_weakref()


def set_shared_type(trainer: Trainer, dtype: torch.dtype | None) -> None:
    """Set the dtype that FSDP2 computes in; it must not round the loss to that dtype, and sums gradients in float32."""
    if find_engine() != "fsdp2":
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    elif policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype)


@contextlib.contextmanager
def translate_lost_processes() -> Iterator[None]:
    """Say in one sentence that another process of the launch is gone, where torch tells of a broken connection.

    Raises:
        TrainingError: it is gone.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _LOST)
        if count_processes() == 1 or not is_lost:
            raise
        raise TrainingError(
            f"another process of this launch has ended ({str(error).splitlines()[0]}); look at what it printed, on its machine, and then "
            f"launch all processes again, with {name_option('--resume')} where the run has a checkpoint"
        ) from error


def leave_processes() -> None:
    """Close the process group; a process that exits without it may be killed by its own threads and report a failure."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Gather sharded weights: the main process gets all trained weights, the others an empty dictionary.

    Every process must call it, since each sends its share. Returns None where nothing is sharded.
    """
    kind = ENGINES[find_engine()]
    if not kind.shards_weights:
        return None
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    if kind.is_deepspeed:
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        if trainer.is_world_process_zero() and (lacking := [name for name in trained if name not in whole]):
            raise TrainingError(f"{lacking[0]} could not be gathered from the processes; this is a fault of the kit")
        return {name: whole[name] for name in trained if name in whole}
    weights = {}
    for name, tensor in trained.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if trainer.is_world_process_zero():
            weights[name] = gathered.detach().cpu()
    return weights
