"""Build a recipe's model without weights, and rows that fill every batch to the last token."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as quantization
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.quantizers import AutoHfQuantizer

from finetune.checkpoints.checkpoint_table import find_alias
from finetune.checkpoints.finding import find_text_files
from finetune.compat import keep_in_place, load_fake_tensors, make_without_weights
from finetune.data.account import DataReport, SplitReport
from finetune.data.dataset import Splits
from finetune.data.settings import RowShape
from finetune.models.loading import extend_context, make_quantization
from finetune.models.lora import attach_adapter
from finetune.models.precision import Precision
from finetune.models.streaming.from_main_memory import count_bytes, list_layers, list_matrices, make_slots
from finetune.planning.changes import is_packed
from finetune.recipe.batches import read_batch
from finetune.runs.lineage import find_base
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import Result
from finetune.yulan.folding import describe_llama_config
from finetune.yulan.layout import PUBLISHED_SIZES, parse_native_config, read_config
from finetune.yulan.native.configuration import YuLanMiniConfig, load_native_config
from finetune.yulan.native.modeling import YuLanMiniForCausalLM

FakeTensor, _ = load_fake_tensors()
_BATCHES = 2


def find_model_config(resolved: ResolvedRecipe) -> LlamaConfig | YuLanMiniConfig:
    """Return the configuration of the model that a run would load; no weights are read.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    section = resolved.recipe.model
    if section.architecture != "native":
        return extend_context(LlamaConfig(**read_sizes(resolved)), section)
    if _has_published_sizes(resolved):  # they are the defaults of the class, so no network is needed
        return extend_context(YuLanMiniConfig(), section)
    name = section.checkpoint if resolved.earlier is None else _find_weights(resolved.earlier)
    return extend_context(load_native_config(find_text_files(name)), section)


def _has_published_sizes(resolved: ResolvedRecipe) -> bool:
    """Tell whether a recipe's base checkpoint stands in the table and has the published sizes."""
    return resolved.checkpoint is not None and resolved.checkpoint.has_published_sizes


def build_dry_model(
    resolved: ResolvedRecipe, config: LlamaConfig | YuLanMiniConfig, precision: Precision, fake: Any
) -> PreTrainedModel | PeftModel:
    """Build the model that a run would train, quantized and with its adapter, on tensors without content on a CPU."""
    section = resolved.recipe.model
    model_class: Any = YuLanMiniForCausalLM if section.architecture == "native" else LlamaForCausalLM
    if resolved.method.trains_reward_model:
        model_class, config.num_labels = LlamaForSequenceClassification, 1
    attention = "eager" if section.attention == "eager" else "sdpa"  # the kernels of flash_attn run on a GPU only
    with no_init_weights(), torch.device("meta"):
        base = make_without_weights(model_class, config, dtype=precision.weights, attn_implementation=attention)
        base.tie_weights()  # no_init_weights skips it, and a tied table would be counted twice
        if section.quantize != "none":
            settings = make_quantization(section.quantize, precision.weights)
            base.hf_quantizer = AutoHfQuantizer.from_config(settings)
            base.hf_quantizer.preprocess_model(base, device_map=None)
            base.hf_quantizer.postprocess_model(base)
        model = attach_adapter(base, resolved.recipe.adapter, Path(section.checkpoint))
    moved: dict[int, torch.nn.Parameter] = {}
    quantized: dict[torch.Size, Any] = {}
    for module in model.modules():
        _move_to_fake_cpu(module, fake, moved)
        if isinstance(module, Linear4bit):
            with fake:
                _quantize_layer(module, precision.weights, quantized)
        if isinstance(module, Linear8bitLt):
            with fake:
                _quantize_layer_to_int8(module)
    keep_in_place(model)
    return model


def _move_to_fake_cpu(module: torch.nn.Module, fake: Any, moved: dict[int, torch.nn.Parameter]) -> None:
    """Replace a module's tensors by ones without content on the CPU: autocast, kernels and placement follow the device."""
    cpu = torch.device("cpu")
    for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
        if not isinstance(parameter, FakeTensor):
            if id(parameter) not in moved:  # a tied table is one tensor, twice
                tensor = FakeTensor(fake, torch.empty_like(parameter.detach(), device="meta"), cpu)
                moved[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            setattr(module, name, moved[id(parameter)])
    for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
        if not isinstance(buffer, FakeTensor):
            setattr(module, name, FakeTensor(fake, torch.empty_like(buffer, device="meta"), cpu))


def _quantize_layer(layer: Linear4bit, dtype: torch.dtype, quantized: dict[torch.Size, Any]) -> None:
    """Give a layer the 4-bit weight, scales and scales of scales that bitsandbytes makes when it loads a model.

    `quantized` holds one weight of each shape; copying its form takes a fifth of the time, and a model has 392 such layers.
    """
    dense = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    if dense.shape not in quantized:
        quantized[dense.shape] = quantization.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
    packed, state = quantized[dense.shape]
    weight: Any = torch.nn.Parameter(torch.empty_like(packed), requires_grad=False)
    weight.quant_state = _copy_form(state)
    layer.weight = weight
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(torch.empty(layer.out_features, dtype=dtype), requires_grad=False)


def _copy_form(state: QuantState) -> QuantState:
    """Return a quantization state of the same sizes that shares no tensor."""
    alike = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        if getattr(state, name) is not None:
            setattr(alike, name, torch.empty_like(getattr(state, name)))
    if state.nested:
        alike.state2 = _copy_form(state.state2)
    return alike


def _quantize_layer_to_int8(layer: Linear8bitLt) -> None:
    """Give a layer an 8-bit weight and a scale for each of its rows."""
    weight: Any = torch.nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    weight.CB = weight.SCB = None
    layer.weight = weight
    layer.state.CB = weight.data
    layer.state.SCB = torch.empty(layer.out_features, dtype=torch.float32)


def stream_dry_layers(model: PreTrainedModel | PeftModel, fake: Any) -> int:
    """Let the layers of a model without content share two slots, as a stream does; return the bytes that leave the device.

    With L layers of B bytes each (`count_bytes`: packed weights, each rounded up to 512 bytes), 2 B of L B stay.
    """
    layers = [list_matrices(layer) for layer in list_layers(model)]
    with fake:
        slots = make_slots(layers, torch.device("cpu"))
        for number, matrices in enumerate(layers):
            for matrix in matrices:
                matrix.place(slots[number % len(slots)])
    return sum(map(count_bytes, layers))


def read_sizes(resolved: ResolvedRecipe) -> Mapping[str, Any]:
    """Return the Llama configuration of the model that a recipe trains: from the table, its folder, or its hub page.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    if resolved.earlier is None and _has_published_sizes(resolved):
        return PUBLISHED_SIZES
    name = resolved.recipe.model.checkpoint if resolved.earlier is None else _find_weights(resolved.earlier)
    row = find_alias(name)
    if row is not None and row.has_published_sizes:
        return PUBLISHED_SIZES
    return _to_llama(find_text_files(name))


def _find_weights(earlier: Result) -> str:
    """Return the folder of the weights that an earlier run was trained on, or the name of its base checkpoint."""
    if earlier.kind == "model":
        return str(earlier.folder)
    if earlier.lineage is None:
        return str(find_base(earlier))
    return earlier.lineage.base if Path(earlier.lineage.base).is_dir() else earlier.lineage.checkpoint


def _to_llama(folder: Path) -> Mapping[str, Any]:
    content = read_config(folder)
    if content.get("model_type") == "llama":
        return content
    return describe_llama_config(parse_native_config(content, folder), torch.float32)


def make_full_rows(resolved: ResolvedRecipe) -> Splits:
    """Return rows for two batches: each of the most tokens that a row may have, or of half as many where rows are packed."""
    packs, most = is_packed(resolved), resolved.recipe.data.max_tokens
    length = most // 2 if packs else most
    batch = read_batch(resolved.recipe)
    count = _BATCHES * batch * (2 if packs else 1)
    columns = _fill_columns(resolved.method.shape, length)
    rows = Dataset.from_dict({name: [value] * count for name, value in columns.items()})
    report = SplitReport(count, count, 0, 0, 0, count * length, count * length, length, length, [])
    return Splits(rows, None, DataReport(report, None, {}, "", "", ""))


def _fill_columns(shape: RowShape, length: int) -> Mapping[str, Any]:
    """Return the columns of one full row; where prompt and answer are apart, each takes half of the tokens."""
    row = list(range(1, length + 1))
    prompt, answer = row[: length // 2], row[length // 2 :]
    if shape == "pair":
        return {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer}
    if shape == "labelled":
        return {"prompt_ids": prompt, "completion_ids": answer, "label": True}
    return {"input_ids": row, "labels": row}


def make_stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that can only pad: TRL asks for one, though the rows are tokens already."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
