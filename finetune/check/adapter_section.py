"""Check the section `adapter` of a recipe."""

from collections.abc import Iterator

from finetune.errors import describe_unknown_name
from finetune.recipe.methods import Head
from finetune.recipe.sections import LINEAR_LAYERS, TOKEN_TABLES, WHOLE_MODULES, AdapterSection, ModelSection

# Far above the width of any layer; torch fails to take the memory for larger ones in words of its own.
_MOST_RANK = 1 << 16


def check_adapter_section(adapter: AdapterSection, model: ModelSection, head: Head = "language") -> Iterator[str]:
    """Yield the problems of the section, for a base model that is held as `model` says and has the head of the method."""
    quantize = model.quantize
    if adapter.trains_all_weights:
        for key, value in vars(adapter).items():
            if key != "kind" and value != vars(AdapterSection())[key]:
                yield f"adapter.{key}: has no effect where adapter.kind is none; remove it"
        if quantize != "none":
            yield f"model.quantize: {quantize} weights cannot be trained in full; set adapter.kind: lora, or quantize: none"
        if model.stream_layers:
            yield "model.stream_layers: moves frozen weights only, and adapter.kind: none trains them all; set adapter.kind: lora"
        return
    yield from _check_lora(adapter)
    yield from _check_whole_modules(adapter, head)
    if adapter.changes_base and quantize != "none":
        yield (
            f"adapter.init: {adapter.init} changes the base weights before step 1, which quantized weights do not allow; "
            f"set model.quantize: none, or remove adapter.init; found model.quantize: {quantize}"
        )
    if adapter.beginning.holds_rounding and quantize != "nf4":
        yield (
            f"adapter.init: {adapter.init} begins with a part of what 4 bits round off the base weights; set model.quantize: nf4, or "
            f"remove adapter.init; found model.quantize: {quantize}"
        )


def _check_lora(adapter: AdapterSection) -> Iterator[str]:
    if adapter.rank < 1:
        yield f"adapter.rank: must be at least 1; found {adapter.rank}"
    if adapter.rank > _MOST_RANK:
        yield f"adapter.rank: must be at most {_MOST_RANK:,}; found {adapter.rank}"
    if adapter.alpha <= 0:
        yield f"adapter.alpha: must be above 0; found {adapter.alpha}"
    if not 0 <= adapter.dropout < 1:
        yield f"adapter.dropout: must be at least 0 and below 1; found {adapter.dropout}"
    if not adapter.targets:
        yield "adapter.targets: is empty; use all-linear, or names such as q_proj"
    for target in adapter.targets:
        if target == "lm_head":
            yield "adapter.targets: lm_head cannot carry LoRA (TRL's loss reads its weight directly); use adapter.modules_to_save"
        elif target not in LINEAR_LAYERS and adapter.targets != ("all-linear",):
            yield f"adapter.targets: {target!r} is {describe_unknown_name(target, LINEAR_LAYERS)}; or all-linear alone"
    if any(token < 0 for token in adapter.train_tokens) or len(set(adapter.train_tokens)) < len(adapter.train_tokens):
        yield f"adapter.train_tokens: must be token ids, each once; found {list(adapter.train_tokens)}"
    if not adapter.beginning.starts_empty and adapter.dora:
        yield f"adapter.dora: cannot be combined with adapter.init: {adapter.init}; remove one of the two"
    if any(layer < 0 for layer in adapter.layers) or len(set(adapter.layers)) < len(adapter.layers):
        yield f"adapter.layers: must be numbers of layers from 0 on, each once; found {list(adapter.layers)}"
    if adapter.loraplus_ratio is not None and adapter.loraplus_ratio <= 0:
        yield f"adapter.loraplus_ratio: must be above 0 (1 is plain LoRA, 4 to 16 are usual); found {adapter.loraplus_ratio}"


def _check_whole_modules(adapter: AdapterSection, head: Head) -> Iterator[str]:
    names = adapter.modules_to_save
    if len(set(names)) < len(names):
        yield f"adapter.modules_to_save: must name each module once; found {list(names)}"
    for name in dict.fromkeys(names):
        if name in LINEAR_LAYERS:
            yield (
                f"adapter.modules_to_save: {name} is a linear layer, which LoRA trains (adapter.targets); its whole weights are "
                "trained by adapter.kind: none"
            )
        elif name not in WHOLE_MODULES:
            yield f"adapter.modules_to_save: {name!r} is {describe_unknown_name(name, WHOLE_MODULES)}"
    if head != "language" and "lm_head" in names:
        yield "adapter.modules_to_save: a reward model has no lm_head, and its own new head is always trained; remove lm_head"
    if adapter.train_tokens and (tables := [table for table in TOKEN_TABLES if table in names]):
        yield (
            f"adapter.train_tokens: trains rows of the token tables, and adapter.modules_to_save trains {' and '.join(tables)} whole; "
            "set train_tokens: [], or remove the tables from modules_to_save"
        )
