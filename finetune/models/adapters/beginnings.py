"""Give a new adapter the beginning that a recipe's `adapter.init` names, where PEFT needs more than the model for it.

EVA and CorDA run training rows through the base model; LoftQ reads the weights of the base before they were quantized. A run that is
resumed reads its adapter from the checkpoint, and only needs its base as it was changed.
"""

import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetune.errors import TrainingError, describe_count
from finetune.models.adapters.row_texts import RowTexts, Text, pad_texts
from finetune.recipe.sections import AdapterSection
from finetune.runs.run_files import PEFT_WEIGHTS_FILE
from finetune.yulan.tensors import open_tensor_files

logger = logging.getLogger(__name__)

Begin = Callable[[PeftModel], None]
_ADAPTER = "default"
# EVA compares the directions of two batches that follow each other. A batch of fewer tokens than LoRA's rank is passed over by PEFT,
# and one of hardly more moves them at random: rank 16 took 294 passes on nano with one row a batch, and 55 with about 200 tokens.
_TOKENS_OF_BATCH, _TOKENS_OF_RANK = 256, 16
_MOST_BATCHES, _MOST_PASSES = 256, 1024
# A covariance needs several tokens for each of its dimensions. Source: PEFT 0.21, `preprocess_corda`.
_TOKENS_OF_WIDTH = 128
# As for PiSSA (see lora.py).
_POWER_ITERATIONS = 16


@dataclass(frozen=True)
class BeginningInputs:
    """What a beginning is made of: the base checkpoint and the rows, or the initial adapter of a run that is resumed."""

    base: Path
    texts: RowTexts
    initial: Path | None = None


def prepare_beginning(model: PreTrainedModel, section: AdapterSection, inputs: BeginningInputs) -> Begin:
    """Return what gives an adapter its beginning after it was attached to the model; the model has none yet.

    Raises:
        TrainingError: the rows are too few, or LoRA's rank is larger than a layer.
    """
    prepare = _PREPARATIONS.get(section.init)
    if section.trains_all_weights or (prepare is None and not section.changes_base):
        return _leave_as_it_is
    if section.rank > (most := min(_list_widths(model, section))):
        raise TrainingError(
            f"adapter.rank: {section.init} finds at most {most} directions in a layer of this base; lower the rank; found {section.rank}"
        )
    if prepare is None:
        return _leave_as_it_is
    if inputs.initial is not None:
        return _take_from_base(inputs.initial) if section.changes_base else _leave_as_it_is
    return prepare(model, section, inputs)


def _leave_as_it_is(tuned: PeftModel) -> None:
    """Keep an adapter as PEFT made it."""


def _prepare_eva(model: PreTrainedModel, section: AdapterSection, inputs: BeginningInputs) -> Begin:
    """Find the directions in which the inputs of each layer vary most, which become the rows of LoRA's A.

    The rank stays that of the recipe in every layer (PEFT's rho of 1), as the plan of memory counts it.

    Source: EVA (arXiv 2410.07170).
    """
    batches = _make_batches(inputs.texts, section.rank, model.device)
    if not batches:
        raise TrainingError(
            f"adapter.init: {section.init} needs at least {describe_count(section.rank, 'trained token')}, adapter.rank, and the rows have fewer; give more "
            "rows, or lower the rank"
        )
    passes, used = itertools.count(1), describe_count(len(batches), "batch", "batches")

    def run(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        if next(passes) > _MOST_PASSES:
            raise TrainingError(
                f"adapter.init: the directions of {section.init} still change after {describe_count(_MOST_PASSES, 'pass', 'passes')} over {used}; "
                "give more rows, lower adapter.rank, or take another init"
            )
        _run_layers(model, batch)

    config = _name_targets(section, eva_config=EvaConfig(rho=1.0))
    found = get_eva_state_dict(
        model, batches, config, forward_fn=run, gather_distributed_inputs=False, show_progress_bar=False
    )
    done = describe_count(next(passes) - 1, "pass", "passes")
    logger.info("adapter.init: %s: its directions settled after %s over %s of rows", section.init, done, used)

    def begin(tuned: PeftModel) -> None:
        for name, layer in _list_layers(tuned):
            layer.lora_A[_ADAPTER].weight.data.copy_(found[name])

    return begin


def _prepare_corda(model: PreTrainedModel, section: AdapterSection, inputs: BeginningInputs) -> Begin:
    """Split each weight by the covariance of its inputs; the leading part becomes the adapter and leaves the base.

    Source: CorDA (arXiv 2406.05223), its instruction-previewed mode.
    """
    most = _TOKENS_OF_WIDTH * int(model.config.hidden_size)
    used = 0

    def run() -> None:
        nonlocal used
        for text in inputs.texts:
            _run_layers(model, pad_texts([text], model.device))  # PEFT multiplies the tokens of one text at a time
            used += len(text.ids)
            if used >= most:
                break

    was_training = model.training
    preprocess_corda(model, _name_targets(section, corda_config=CordaConfig()), run)
    model.train(was_training)
    logger.info("adapter.init: %s: read %s of rows", section.init, describe_count(used, "token"))

    def begin(tuned: PeftModel) -> None:
        for _, layer in _list_layers(tuned):
            layer.corda_init(_ADAPTER, section.init)

    return begin


def _prepare_loftq(model: PreTrainedModel, section: AdapterSection, inputs: BeginningInputs) -> Begin:
    """Begin with the best approximation, of LoRA's rank, of what quantization has rounded off each weight.

    PEFT's own function for a base that is quantized already runs on GPUs only, and leaves LoRA's scale out.

    Source: LoftQ (arXiv 2310.08659), algorithm 1 with one step.
    """

    def begin(tuned: PeftModel) -> None:
        functional, stored = importlib.import_module("bitsandbytes.functional"), open_tensor_files(inputs.base)
        for name, layer in _list_layers(tuned):
            weight = layer.get_base_layer().weight
            rounded = functional.dequantize_4bit(weight.data, weight.quant_state).float()
            error = stored.read(f"{name}.weight").to(rounded) - rounded
            error /= layer.scaling[_ADAPTER]
            found = torch.svd_lowrank(error, q=min(2 * section.rank, *error.shape), niter=_POWER_ITERATIONS)
            left, sizes, right = (part[..., : section.rank] for part in found)
            layer.lora_A[_ADAPTER].weight.data.copy_(sizes.sqrt()[:, None] * right.T)
            layer.lora_B[_ADAPTER].weight.data.copy_(left * sizes.sqrt())

    return begin


_PREPARATIONS: Mapping[str, Callable[[PreTrainedModel, AdapterSection, BeginningInputs], Begin]] = {
    "eva": _prepare_eva,
    "corda": _prepare_corda,
    "loftq": _prepare_loftq,
}


def _take_from_base(initial: Path) -> Begin:
    """Take an adapter's initial state out of the base, as PEFT did before step 1, to the same bits."""
    stored = load_file(initial / PEFT_WEIGHTS_FILE)

    def begin(tuned: PeftModel) -> None:
        for name, layer in _list_layers(tuned):
            weight = layer.get_base_layer().weight
            a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].to(weight.device) for side in "AB")
            weight.data = (weight.data.float() - layer.scaling[_ADAPTER] * b @ a).to(weight.dtype)

    return begin


def _make_batches(texts: RowTexts, rank: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return batches of enough trained tokens; the last one may have fewer, but at least as many as LoRA's rank."""
    batches, least = list[dict[str, torch.Tensor]](), max(_TOKENS_OF_BATCH, _TOKENS_OF_RANK * rank)
    batch, tokens = list[Text](), 0
    for text in texts:
        batch.append(text)
        tokens += sum(text.trained)
        if tokens >= least:
            batches.append(pad_texts(batch, device))
            batch, tokens = [], 0
        if len(batches) == _MOST_BATCHES:
            return batches
    return [*batches, pad_texts(batch, device)] if tokens >= rank else batches


def _run_layers(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    """Run a batch through the layers; logits would take more memory than all of them."""
    model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _name_targets(section: AdapterSection, **options: Any) -> LoraConfig:
    """Return PEFT's configuration for a model without an adapter, in which it looks for the linear layers by their names."""
    return LoraConfig(
        r=section.rank,
        target_modules=list(section.linear_layers),
        layers_to_transform=list(section.layers) or None,
        layers_pattern="layers" if section.layers else None,
        init_lora_weights=section.init,
        **options,
    )


def _list_widths(model: PreTrainedModel, section: AdapterSection) -> list[int]:
    """Return for every linear layer that gets an adapter the most directions that its weight can have."""
    linear = (module for name, module in model.named_modules() if name.endswith(section.linear_layers))
    return [min(module.in_features, module.out_features) for module in linear]


def _list_layers(tuned: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield each layer with LoRA, by the name that it has in the base model."""
    for name, module in tuned.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
