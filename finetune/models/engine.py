"""Find and set up the engine by which the processes of `accelerate launch` share a run: whole copies, or sharded tensors."""

import os
from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from finetune.compat import shard_on_cpu
from finetune.errors import MachineError, RecipeError
from finetune.runs.resolved_recipe import ResolvedRecipe

Engine = Literal["one", "ddp", "fsdp2", "zero2", "zero3"]
ENGINE_NAMES = {"one": "", "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_CONFIG = "in accelerate's configuration; see recipes/accelerate/fsdp2.yaml"


def find_engine() -> Engine:
    """Return the engine that this process was launched with.

    Raises:
        MachineError: the kit does not support the engine, or one of its settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    return "ddp"


def check_engine(resolved: ResolvedRecipe, engine: Engine) -> None:
    """Check that an engine can train a recipe, before anything is loaded.

    Raises:
        RecipeError: it cannot; the message names the keys to change.
    """
    recipe, problems = resolved.recipe, []
    if engine in ("fsdp2", "zero3") and recipe.adapter.train_tokens:
        problems.append(
            f"adapter.train_tokens: PEFT replaces rows of whole embedding tables, and {ENGINE_NAMES[engine]} shards them; "
            "set train_tokens: [], or launch with recipes/accelerate/ddp.yaml"
        )
    if engine in ("fsdp2", "zero3") and recipe.model.quantize == "int8":
        problems.append("model.quantize: int8 weights cannot be sharded; set nf4 or none")
    if engine in ("fsdp2", "zero3") and recipe.rewards.judge.run:
        problems.append(
            f"rewards.judge.run: the judge needs the whole base model, and {ENGINE_NAMES[engine]} shards it; "
            "launch with recipes/accelerate/ddp.yaml"
        )
    if engine == "fsdp2" and "bit" in str(recipe.trainer.get("optim", "")):
        problems.append(
            f"trainer.optim: {recipe.trainer['optim']} cannot step sharded tensors; set adamw_torch, whose moments can be sharded"
        )
    if resolved.method.is_pretraining and engine.startswith("zero"):
        problems.append(
            f"method: {recipe.method} uses an optimizer of its own, which DeepSpeed would replace; launch with "
            "recipes/accelerate/fsdp2.yaml"
        )
    if engine == "fsdp2" and recipe.optimizer.moments != "float32":
        problems.append(
            f"optimizer.moments: moments of the kind {recipe.optimizer.moments} cannot be sharded; set float32"
        )
    if problems:
        raise RecipeError(f"under {ENGINE_NAMES[engine]}", problems)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def let_cpu_shard(config: TrainingArguments) -> None:
    """Let FSDP2 shard on the CPU too, where this process was launched with it."""
    if find_engine() == "fsdp2" and config.device.type == "cpu":
        shard_on_cpu("bf16" if config.bf16 else "fp16" if config.fp16 else "no")


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


def leave_processes() -> None:
    """Close the process group; a process that exits without it may be killed by its own threads and report a failure."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Gather sharded weights: the main process gets all trained weights, the others an empty dictionary.

    Every process must call it, since each sends its share. Returns None where nothing is sharded.
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
