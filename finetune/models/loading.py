"""Load a base model for training or for use, on the device of this process."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from finetune.compat import keep_weights_differentiable
from finetune.errors import MachineError
from finetune.models.engine import ENGINES, find_engine
from finetune.models.precision import Precision
from finetune.recipe.methods import Head
from finetune.recipe.sections import ModelSection
from finetune.yulan.llama_files import check_llama
from finetune.yulan.native.configuration import YuLanMiniConfig, load_native_config
from finetune.yulan.native.modeling import flatten_alphas, load_native

# Quantization leaves these heads unquantized.
_HEADS = ("lm_head", "score")


def load_base(
    folder: Path, section: ModelSection, precision: Precision, device: torch.device, head: Head = "language"
) -> PreTrainedModel:
    """Load a whole base model on one device, in the recipe's architecture and quantization; `head="score"` adds a new head.

    On the meta device it has no values: only names and shapes are read.

    Raises:
        CheckpointError: files are damaged, or tensors are missing.
        MachineError: the quantization or the attention kernel cannot run here.
    """
    if section.quantize != "none":
        check_quantization(section.quantize, device)
    if section.architecture != "native":
        check_llama(folder, head)
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
                section.quantize, precision.weights, is_sharded=ENGINES[find_engine()].shards_weights
            ),
            attn_implementation=None if section.attention == "auto" else section.attention,
            # One whole copy on this process's device; "auto" would spread it over all and break data parallelism.
            device_map={"": device} if device.type in ("cuda", "meta") else None,
            local_files_only=True,
        )
    except ImportError as error:
        raise MachineError(
            f"model.attention: {section.attention} cannot run here: {str(error).splitlines()[0]}"
        ) from error
    if section.architecture == "native" and find_engine() == "fsdp2":
        flatten_alphas(model)
    if section.quantize == "nf4":
        keep_weights_differentiable(model)
    return model if section.quantize != "none" else model.to(device)


def load_config(folder: Path, section: ModelSection) -> LlamaConfig | YuLanMiniConfig:
    """Load the configuration of a base model, with the positions that the recipe sets.

    Raises:
        CheckpointError: a native configuration cannot be read or used.
    """
    is_native = section.architecture == "native"
    config = load_native_config(folder) if is_native else LlamaConfig.from_pretrained(folder)
    return extend_context(config, section)


def extend_context(config: LlamaConfig | YuLanMiniConfig, section: ModelSection) -> LlamaConfig | YuLanMiniConfig:
    """Set the number of positions and the base of RoPE where the recipe sets them; return the same configuration."""
    if section.max_positions is not None:
        config.max_position_embeddings = section.max_positions
    if section.rope_theta is not None:
        config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": section.rope_theta}
    return config


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
        # FSDP2 and ZeRO-3 shard floating-point tensors only, so the packed bytes are stored under a floating-point dtype.
        bnb_4bit_quant_storage=compute_dtype if is_sharded else None,
    )


def check_quantization(quantize: str, device: torch.device) -> None:
    """Quantize one small matrix on the device, so that a machine that cannot do it fails before anything is loaded.

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
