"""Attach a LoRA adapter to a base model, and save it so that it fits the published weights."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer

from finetune.compat import complete_head
from finetune.errors import FinetuneError, TrainingError, describe_count
from finetune.files.json_files import read_json, write_json
from finetune.models.adapter_config import read_adapter_config
from finetune.models.adapters.whole_modules import name_whole_modules, widen_copies
from finetune.recipe.sections import AdapterSection
from finetune.runs.run_files import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE
from finetune.yulan.tensors import read_header

# Sixteen power iterations give the leading singular vectors to float32 accuracy; a full decomposition of the real
# matrices would take minutes. Source: PiSSA (arXiv 2404.02948), section 4.
_INITS: Mapping[str, str | bool] = {"pissa": "pissa_niter_16", "olora": "olora"}
# Tied tables are untied in an export; keys that PEFT does not know are checked there, too.
_PEFT_WARNINGS = (
    "Model has `tie_word_embeddings=True`",
    "Unexpected keyword arguments",
    "fan_in_fan_out is set to True",
)
# Whole tables in an adapter's file.
_TABLES = tuple(f"{table}.{kind}weight" for table in ("embed_tokens", "lm_head") for kind in ("", "base_layer."))
# Other programs look for these keys, also where they hold the default.
_KEPT_KEYS = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "bias")
# Embeddings of tokens that never occurred in training keep their small initial norm, or were only decayed.
_UNTRAINED_RATIO = 0.25


def attach_adapter(model: PreTrainedModel, section: AdapterSection, base: Path) -> PreTrainedModel | PeftModel:
    """Return the model with a fresh LoRA adapter in float32, or the model itself where all weights are trained.

    Raises:
        TrainingError: `train_tokens` names a token outside the embedding table, or `layers` a layer that is not there.
    """
    if section.trains_all_weights:
        return model
    rows = model.get_input_embeddings().weight.shape[0]
    if beyond := [token for token in section.train_tokens if token >= rows]:
        raise TrainingError(f"adapter.train_tokens: {beyond} lie outside the embedding table of {rows:,} tokens")
    layers = model.config.num_hidden_layers
    if beyond := [layer for layer in section.layers if layer >= layers]:
        raise TrainingError(
            f"adapter.layers: {beyond} lie outside the {describe_count(layers, 'layer')} of the base model, 0 to {layers - 1}"
        )
    tokens = list(section.train_tokens)
    config = LoraConfig(
        # SEQ_CLS makes PEFT train and save the whole new head of a reward model.
        task_type="CAUSAL_LM" if _has_language_head(model) else "SEQ_CLS",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_name_modules(section),
        layers_to_transform=list(section.layers) or None,
        layers_pattern="layers" if section.layers else None,
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights=_INITS.get(section.init, True),
        trainable_token_indices=dict.fromkeys(_list_tables(model), tokens) if tokens else None,
        modules_to_save=name_whole_modules(section.modules_to_save),
    )
    model.name_or_path = str(base)
    with _ignore_warnings():
        tuned = get_peft_model(model, config)
    widen_copies(tuned)
    # TRL adds a second adapter of this configuration as its reference model, which must not change the base weights again.
    config.init_lora_weights = True
    return complete_head(tuned)


def _name_modules(section: AdapterSection) -> str | list[str]:
    # PEFT chooses layers only among names.
    return "all-linear" if section.targets == ("all-linear",) and not section.layers else list(section.linear_layers)


def raise_rate_of_b(trainer: Trainer, ratio: float) -> None:
    """Let a trainer's optimizer train LoRA's B at `ratio` times the learning rate of A. Source: LoRA+ (arXiv 2402.12354)."""
    config = trainer.args

    def make(model: PeftModel, **_: object) -> torch.optim.Optimizer:
        kind, options = trainer.get_optimizer_cls_and_kwargs(config, model)
        decay = config.weight_decay
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **options
        )
        return optimizer

    trainer.optimizer_cls_and_kwargs = (lambda: make, {})


def continue_adapter(model: PreTrainedModel, section: AdapterSection, folder: Path) -> PeftModel:
    """Return the model with the adapter of an earlier run, to be trained further; only its dropout is the recipe's.

    A reward model that continues the adapter of a language model leaves out the trained rows of the language head.
    """
    config = LoraConfig.from_pretrained(folder)
    config.lora_dropout = section.dropout
    if not _has_language_head(model) and config.task_type != "SEQ_CLS":
        return _continue_without_head(model, config, folder)
    with _ignore_warnings():
        tuned: PeftModel = PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    if widen_copies(tuned):  # the stored float32 values were rounded to the dtype of the base
        set_peft_model_state_dict(tuned, load_file(folder / PEFT_WEIGHTS_FILE))
    return complete_head(tuned)


def apply_adapter(model: PreTrainedModel, folder: Path, *, assigns: bool = False) -> PeftModel:
    """Return a base model with a trained adapter applied live by PEFT, its tables enlarged where the adapter's are.

    `assigns` takes the stored tensors as they are, and copies no values into those of the model, which may be placeholders.

    Raises:
        FinetuneError: the adapter is damaged, its configuration cannot be used, or PEFT refuses the adapter.
    """
    settings = read_adapter_config(folder)
    enlarge_tables(model, folder)
    try:
        with _ignore_warnings():
            config = LoraConfig.from_peft_type(**settings)
            return PeftModel.from_pretrained(model, folder, config=config, low_cpu_mem_usage=assigns)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise FinetuneError(f"{folder}: PEFT cannot apply this adapter to its base: {error}") from error


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _PEFT_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def enlarge_tables(model: PreTrainedModel, folder: Path) -> None:
    """Enlarge a model's token tables to the size of those in an adapter's file, if there are any."""
    rows = _count_rows(folder)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


@contextlib.contextmanager
def disable_adapter(tuned: PeftModel) -> Iterator[None]:
    """Run the base model without its adapter. PEFT warns that trained biases stay, which only makes the measured effect smaller."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
        with tuned.disable_adapter():
            yield


def _count_rows(folder: Path) -> int:
    """Return the most tokens that a table in an adapter's file has, or 0."""
    entries = read_header(folder / PEFT_WEIGHTS_FILE)
    return max((entry.shape[0] for name, entry in entries.items() if name.endswith(_TABLES) and entry.shape), default=0)


def _continue_without_head(model: PreTrainedModel, config: LoraConfig, folder: Path) -> PeftModel:
    config.task_type, config.inference_mode = "SEQ_CLS", False
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        config.trainable_token_indices = {name: rows for name, rows in tokens.items() if name != "lm_head"}
    if config.modules_to_save:
        config.modules_to_save = [name for name in config.modules_to_save if name != "lm_head"]
    with _ignore_warnings():
        tuned: PeftModel = get_peft_model(model, config)
    widen_copies(tuned)
    weights = {name: tensor for name, tensor in load_file(folder / PEFT_WEIGHTS_FILE).items() if "lm_head" not in name}
    # PEFT sets the whole new head too, and fails where its values are not there; it keeps those that it has.
    head = {name: tensor for name, tensor in get_peft_model_state_dict(tuned).items() if name.endswith("score.weight")}
    set_peft_model_state_dict(tuned, {**weights, **head})
    return tuned


def _list_tables(model: PreTrainedModel) -> list[str]:
    """Name the tables whose rows `train_tokens` trains; where the head is tied, PEFT gives it the embedding's rows."""
    has_own_head = _has_language_head(model) and not model.config.tie_word_embeddings
    return ["embed_tokens", "lm_head"] if has_own_head else ["embed_tokens"]


def _has_language_head(model: PreTrainedModel) -> bool:
    """Tell whether the model has a language head, rather than one that gives a text a score."""
    return model.get_output_embeddings() is not None


def find_untrained_tokens(model: PreTrainedModel, token_ids: Sequence[int]) -> list[int]:
    """Return the tokens whose embeddings look untrained: their norm is far below the median."""
    found = set()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for table in (table for table in tables if table is not None):
        sizes = torch.linalg.vector_norm(table.weight.detach(), dim=1, dtype=torch.float32)
        usual = sizes.median()
        found |= {token for token in token_ids if sizes[token] < _UNTRAINED_RATIO * usual}
    return sorted(found)


def save_adapter(model: PeftModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Save the adapter as PEFT does, without copies of the embedding tables; `weights` replace the model's own where given.

    Settings that have their default value are left out: an older PEFT refuses an adapter for any key that it does not know.
    """
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"], state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT writes an empty model card
    config, defaults = read_json(folder / PEFT_CONFIG_FILE), list_adapter_defaults()
    kept = {key: value for key, value in config.items() if key in _KEPT_KEYS or value != defaults.get(key)}
    kept.pop("peft_version", None)
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"].sort()  # PEFT writes a set, in another order each time
    write_json(folder / PEFT_CONFIG_FILE, kept)


def list_adapter_defaults() -> dict[str, Any]:
    """Return the settings of LoRA with the values that PEFT gives them, as JSON holds them."""
    defaults: dict[str, Any] = LoraConfig().to_dict()
    return defaults


def subtract_initial(folder: Path, initial_folder: Path) -> None:
    """Rewrite a saved PiSSA adapter as an exactly equal LoRA adapter of the unchanged base; `initial` is its first state.

    PiSSA moves the leading part `s * B0 A0` of every weight W into its adapter and trains on what remains, so the trained
    weight is `W - s * B0 A0 + s * B A = W + s * [B | -B0] [A ; A0]`: LoRA of twice the rank with the same scale.

    Source: PiSSA (arXiv 2404.02948), appendix C.
    """
    trained, initial = load_file(folder / PEFT_WEIGHTS_FILE), load_file(initial_folder / PEFT_WEIGHTS_FILE)
    for name, tensor in trained.items():
        if "lora_A" in name:
            trained[name] = torch.cat([tensor, initial[name]], dim=0)
        elif "lora_B" in name:
            trained[name] = torch.cat([tensor, -initial[name]], dim=1)
    config = read_json(folder / PEFT_CONFIG_FILE)
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    for key in ("use_rslora", "init_lora_weights"):  # by default False and True
        config.pop(key, None)
    config.update(r=2 * rank, lora_alpha=scale * 2 * rank)
    save_file(trained, folder / PEFT_WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / PEFT_CONFIG_FILE, config)
