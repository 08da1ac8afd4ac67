"""How several processes share a run, as `accelerate launch` has set it up: whole copies, or shares of every tensor."""

import os
from typing import Literal

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from finetune.errors import MachineError, RecipeError
from finetune.runs.resolved_recipe import ResolvedRecipe

Engine = Literal["one", "ddp", "fsdp2", "zero2", "zero3"]
ENGINE_NAMES = {"one": "", "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_CONFIG = "in accelerate's configuration; see recipes/accelerate/fsdp2.yaml"


def find_engine() -> Engine:
    """Return what this process was launched under.

    Raises:
        MachineError: an engine, or a setting of one, that this kit does not train with.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "one"
    if _is_on("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise MachineError(f"FSDP 1 is not supported; set fsdp_version: 2 {_CONFIG}")
        if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise MachineError(
                "every process must look at the whole base before it keeps its share of it; "
                f"set fsdp_cpu_ram_efficient_loading: false {_CONFIG}"
            )
        return "fsdp2"
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    return "ddp"


def check_engine(resolved: ResolvedRecipe, engine: Engine) -> None:
    """Refuse what an engine cannot share out, before anything is loaded.

    Raises:
        RecipeError: with the keys to change.
    """
    recipe, problems = resolved.recipe, []
    if engine in ("fsdp2", "zero3") and recipe.adapter.train_tokens:
        problems.append(
            f"adapter.train_tokens: PEFT replaces rows of whole tables, and {ENGINE_NAMES[engine]} keeps shares of them; "
            "set train_tokens: [], or launch with recipes/accelerate/ddp.yaml"
        )
    if engine in ("fsdp2", "zero3") and recipe.model.quantize == "int8":
        problems.append("model.quantize: int8 weights cannot be shared out; set nf4 or none")
    if engine in ("fsdp2", "zero3") and recipe.rewards.judge.run:
        problems.append(
            f"rewards.judge.run: the judge reads with the whole base, and {ENGINE_NAMES[engine]} keeps shares of it; "
            "launch with recipes/accelerate/ddp.yaml"
        )
    if engine == "fsdp2" and "bit" in str(recipe.trainer.get("optim", "")):
        problems.append(
            f"trainer.optim: {recipe.trainer['optim']} cannot step shares of tensors; set adamw_torch, whose states are shared"
        )
    if resolved.method.is_pretraining and engine.startswith("zero"):
        problems.append(
            f"method: {recipe.method} steps an optimizer of its own, which DeepSpeed would replace; launch with "
            "recipes/accelerate/fsdp2.yaml"
        )
    if engine == "fsdp2" and recipe.optimizer.moments != "float32":
        problems.append(
            f"optimizer.moments: {recipe.optimizer.moments} ones cannot be shared out; set float32, whose states are shared"
        )
    if problems:
        raise RecipeError(f"under {ENGINE_NAMES[engine]}", problems)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def shard_on_cpu(config: TrainingArguments) -> None:
    """Let FSDP2 shard between processes on the CPU too.

    accelerate reads FSDP's settings for GPUs only and would quietly keep whole copies, though torch shards over gloo as well
    (accelerate 1.15, `AcceleratorState.__init__`).
    """
    if find_engine() != "fsdp2" or config.device.type != "cpu":
        return
    plugin = FullyShardedDataParallelPlugin()
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    state = AcceleratorState(precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def set_shared_type(trainer: Trainer, dtype: torch.dtype | None) -> None:
    """Let FSDP2 round no loss to the type that it computes in; with a type of its own, a run sums gradients in float32."""
    if find_engine() != "fsdp2":
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    elif policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype)


def leave_processes() -> None:
    """End the talk between processes: one that merely exits may be ended by its own threads, with a failed status."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Return the trained weights whole on the main process, nothing on the others, or None where every process has them.

    Every process must call it: those that hold shares send them.
    """
    engine = find_engine()
    if engine not in ("fsdp2", "zero3"):
        return None
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    if engine == "zero3":
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        return {name: whole[name] for name in trained if name in whole}
    weights = {}
    for name, tensor in trained.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if trainer.is_world_process_zero():
            weights[name] = gathered.detach().cpu()
    return weights
