"""Load a base for training or for use, on the device of this process."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from finetune.errors import MachineError
from finetune.models.engine import find_engine
from finetune.recipe.methods import Head
from finetune.recipe.sections import ModelSection
from finetune.yulan.native.configuration import YuLanMiniConfig, load_native_config
from finetune.yulan.native.modeling import flatten_alphas, load_native

AutocastDtype = Literal["no", "bf16", "fp16"]
# Heads stay as they are where the layers are quantized.
_HEADS = ("lm_head", "score")


@dataclass(frozen=True)
class Precision:
    """The type that weights are held in, the one that matrix products run in where that differs, and FSDP2's for all it computes."""

    weights: torch.dtype
    autocast: AutocastDtype
    shared: torch.dtype | None = None


def choose_device(use_cpu: bool = False) -> torch.device:
    """Return this process's own device: the GPU of its LOCAL_RANK, else Apple's, else the CPU."""
    if use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_precision(
    dtype: str, device: torch.device, trains_all_weights: bool, keeps_masters: bool = False
) -> Precision:
    """Choose what suits the device, or follow the recipe's `model.dtype`.

    Where all weights are trained, `auto` and `float16` hold them in float32: an update that is smaller than half a
    step of the type would be lost, and float16 gradients cannot be unscaled. An optimizer that keeps float32 masters
    leaves the model in bfloat16 instead, and all of it computes in that type, as in the published runs.
    """
    if keeps_masters and trains_all_weights:
        held = replace(choose_precision(dtype, device, trains_all_weights=False), autocast="no")
        if held.weights == torch.bfloat16:
            if find_engine() == "one":
                return held
            # Processes that exchange gradients hold float32 weights.
            is_shared = find_engine() == "fsdp2"
            return Precision(torch.float32, "no", torch.bfloat16) if is_shared else Precision(torch.float32, "bf16")
    if dtype == "auto":
        if device.type == "cpu":
            dtype = "float32"
        elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "float16"
        else:
            dtype = "bfloat16"
        if trains_all_weights:
            return Precision(torch.float32, _name_autocast(dtype))
    if dtype == "float16" and trains_all_weights:
        return Precision(torch.float32, "fp16")
    weights = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    return Precision(weights, _name_autocast(dtype))


def _name_autocast(dtype: str) -> AutocastDtype:
    names: dict[str, AutocastDtype] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return names[dtype]


def load_base(
    folder: Path, section: ModelSection, precision: Precision, device: torch.device, head: Head = "language"
) -> PreTrainedModel:
    """Load a base in the recipe's architecture and quantization, whole, on one device; a head for scores is a new one.

    Raises:
        MachineError: the quantization or the attention kernel cannot run here.
    """
    if section.quantize != "none":
        check_quantization(section.quantize, device)
    load: Callable[..., PreTrainedModel] = LlamaForCausalLM.from_pretrained
    config = load_config(folder, section)
    if section.architecture == "native":
        load = load_native
    elif head == "score":
        load, config.num_labels = LlamaForSequenceClassification.from_pretrained, 1
    try:
        model = load(
            folder,
            config=config,
            dtype=precision.weights,
            quantization_config=make_quantization(
                section.quantize, precision.weights, is_sharded=find_engine() in ("fsdp2", "zero3")
            ),
            attn_implementation=None if section.attention == "auto" else section.attention,
            # One whole copy on this process's device; "auto" would spread it over all and break data parallelism.
            device_map={"": device} if device.type == "cuda" else None,
            local_files_only=True,
        )
    except ImportError as error:
        raise MachineError(
            f"model.attention: {section.attention} cannot run here: {str(error).splitlines()[0]}"
        ) from error
    if section.architecture == "native" and find_engine() == "fsdp2":
        flatten_alphas(model)
    if section.quantize == "nf4":
        _keep_weights_differentiable(model)
    return model if section.quantize != "none" else model.to(device)


def load_config(folder: Path, section: ModelSection) -> LlamaConfig | YuLanMiniConfig:
    """Return a base's configuration, with the recipe's own positions.

    Raises:
        CheckpointError: a native one cannot be read or used.
    """
    is_native = section.architecture == "native"
    config = load_native_config(folder) if is_native else LlamaConfig.from_pretrained(folder)
    return extend_context(config, section)


def extend_context(config: LlamaConfig | YuLanMiniConfig, section: ModelSection) -> LlamaConfig | YuLanMiniConfig:
    """Set the longest position and the base of RoPE where a recipe says so, and return the configuration."""
    if section.max_positions is not None:
        config.max_position_embeddings = section.max_positions
    if section.rope_theta is not None:
        config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": section.rope_theta}
    return config


def _keep_weights_differentiable(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for its CPU inference kernel.

    On processors with AVX512-BF16 it does so at the first evaluation, for good, and the kernel has no gradient: training
    would then fail, or go on without the gradient of the layers before (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    layer = importlib.import_module("bitsandbytes.nn").Linear4bit
    for module in model.modules():
        if isinstance(module, layer):
            module.support_avx512bf16_for_cpu = False


def make_quantization(quantize: str, compute_dtype: torch.dtype, is_sharded: bool = False) -> BitsAndBytesConfig | None:
    """Return transformers' settings for a recipe's `model.quantize`, or None for `none`."""
    if quantize == "none":
        return None
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_HEADS))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=list(_HEADS),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # FSDP2 and ZeRO-3 share out floating-point tensors only, so the same bytes are called such.
        bnb_4bit_quant_storage=compute_dtype if is_sharded else None,
    )


def check_quantization(quantize: str, device: torch.device) -> None:
    """Quantize one small matrix on the device, so that a machine that cannot is told before anything is loaded.

    Raises:
        MachineError: bitsandbytes is missing, or does not run on this device.
    """
    advice = "set model.quantize: none, or use a CPU or an NVIDIA GPU with bitsandbytes installed"
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        matrix = torch.zeros(64, 64, device=device)
        if quantize == "nf4":
            functional.quantize_4bit(matrix, quant_type="nf4")
        else:
            functional.int8_vectorwise_quant(matrix.to(torch.float16))
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MachineError(
            f"model.quantize: {quantize} cannot run on this {device.type} device ({reason}); {advice}"
        ) from error
