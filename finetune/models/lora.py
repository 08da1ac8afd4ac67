"""Attach the trained part of a run to its base, and save it so that it fits the base as published."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finetune.errors import TrainingError
from finetune.files.json_files import read_json, write_json
from finetune.recipe.sections import AdapterSection
from finetune.runs.run_files import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE

# Sixteen power iterations give the leading singular vectors to float32 accuracy; a full decomposition of the real
# matrices would take minutes. Source: PiSSA (arXiv 2404.02948), section 4.
_PISSA = "pissa_niter_16"
# A trained row differs from the others by its size. Rows that never occurred keep their initial size, or were only decayed.
_UNTRAINED_RATIO = 0.25


def attach_adapter(model: PreTrainedModel, section: AdapterSection, base: Path) -> PreTrainedModel | PeftModel:
    """Return the model with a fresh LoRA adapter in float32, or the model itself where all weights are trained.

    Raises:
        TrainingError: a token to be trained lies outside the table.
    """
    if section.trains_all_weights:
        return model
    rows = model.get_input_embeddings().weight.shape[0]
    if beyond := [token for token in section.train_tokens if token >= rows]:
        raise TrainingError(f"adapter.train_tokens: {beyond} lie outside the table of {rows:,} tokens")
    tokens = list(section.train_tokens)
    config = LoraConfig(
        # With the second, PEFT trains and keeps the new head for scores as a whole.
        task_type="CAUSAL_LM" if _speaks(model) else "SEQ_CLS",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules="all-linear" if section.targets == ("all-linear",) else list(section.targets),
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights=_PISSA if section.init == "pissa" else True,
        trainable_token_indices=dict.fromkeys(_list_tables(model), tokens) if tokens else None,
    )
    model.name_or_path = str(base)
    tuned = get_peft_model(model, config)
    # Whoever adds another adapter of this form, as TRL does for its reference, must not change the base once more.
    config.init_lora_weights = True
    return _complete_head(tuned)


def continue_adapter(model: PreTrainedModel, section: AdapterSection, folder: Path) -> PeftModel:
    """Return the model with the adapter of an earlier run, to be trained further; dropout alone is the recipe's.

    A reward model takes over what its adapter shares with that of a language model: all but the rows of a language head.
    """
    config = LoraConfig.from_pretrained(folder)
    config.lora_dropout = section.dropout
    if not _speaks(model) and config.task_type != "SEQ_CLS":
        return _continue_without_head(model, config, folder)
    return _complete_head(PeftModel.from_pretrained(model, folder, is_trainable=True, config=config))


def _continue_without_head(model: PreTrainedModel, config: LoraConfig, folder: Path) -> PeftModel:
    config.task_type, config.inference_mode = "SEQ_CLS", False
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        config.trainable_token_indices = {name: rows for name, rows in tokens.items() if name != "lm_head"}
    tuned: PeftModel = get_peft_model(model, config)
    weights = {name: tensor for name, tensor in load_file(folder / PEFT_WEIGHTS_FILE).items() if "lm_head" not in name}
    set_peft_model_state_dict(tuned, weights)
    return tuned


def _complete_head(tuned: PeftModel) -> PeftModel:
    """Give a head of which rows are trained the `bias` that TRL's loss reads; PEFT's wrapper passes on the weight only."""
    head = tuned.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", None)
    return tuned


def _list_tables(model: PreTrainedModel) -> list[str]:
    """Name the tables that carry rows of their own: where the head is tied, PEFT gives it the embedding's."""
    has_own_head = _speaks(model) and not model.config.tie_word_embeddings
    return ["embed_tokens", "lm_head"] if has_own_head else ["embed_tokens"]


def _speaks(model: PreTrainedModel) -> bool:
    """Tell a language model from one that gives a text a score."""
    return model.get_output_embeddings() is not None


def find_untrained_tokens(model: PreTrainedModel, token_ids: Sequence[int]) -> list[int]:
    """Return those tokens whose rows look as if training never reached them: far smaller than the usual row."""
    found = set()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for table in (table for table in tables if table is not None):
        sizes = torch.linalg.vector_norm(table.weight.detach(), dim=1, dtype=torch.float32)
        usual = sizes.median()
        found |= {token for token in token_ids if sizes[token] < _UNTRAINED_RATIO * usual}
    return sorted(found)


def save_adapter(model: PeftModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapter as PEFT does, without copies of the embedding tables; `weights` in place of the model's own."""
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"], state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card is a form with nothing filled in


def subtract_start(folder: Path, start: Path) -> None:
    """Rewrite a saved PiSSA adapter as a plain LoRA adapter of the unchanged base, exactly.

    PiSSA moves the leading part `s * B0 A0` of every weight W into its adapter and trains on what remains, so the trained
    weight is `W - s * B0 A0 + s * B A = W + s * [B | -B0] [A ; A0]`: LoRA of twice the rank with the same scale.

    Source: PiSSA (arXiv 2404.02948), appendix C.
    """
    trained, initial = load_file(folder / PEFT_WEIGHTS_FILE), load_file(start / PEFT_WEIGHTS_FILE)
    for name, tensor in trained.items():
        if "lora_A" in name:
            trained[name] = torch.cat([tensor, initial[name]], dim=0)
        elif "lora_B" in name:
            trained[name] = torch.cat([tensor, -initial[name]], dim=1)
    config = read_json(folder / PEFT_CONFIG_FILE)
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    config.update(r=2 * rank, lora_alpha=scale * 2 * rank, use_rslora=False, init_lora_weights=True)
    save_file(trained, folder / PEFT_WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / PEFT_CONFIG_FILE, config)
