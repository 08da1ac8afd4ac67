"""What lies beside the weights of an export: configuration, tokenizer, one template, and the same stop tokens everywhere."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.encoding.tokenizer import load_tokenizer_file
from finetune.errors import ExportError, describe_count
from finetune.files.json_files import read_json, write_json
from finetune.yulan.folding import describe_llama_config
from finetune.yulan.layout import parse_native_config, read_config
from finetune.yulan.llama_files import read_rope
from finetune.yulan.tensors import name_dtype
from finetune.yulan.tokenizer_files import TEMPLATE_FILE, copy_tokenizer

if TYPE_CHECKING:
    from finetune.exporting.merged import Merged, Subject
    from finetune.runs.results import Lineage

logger = logging.getLogger(__name__)

# Keys of a generation_config.json that say which program wrote it.
_OF_THE_FILE = ("transformers_version", "_from_model_config")
# These belong to how the base was stored, loaded or trained once, not to the exported weights. Training with gradient
# checkpointing leaves `use_cache: false`, with which every new token would read the whole text again.
_STALE_KEYS = (
    "quantization_config",
    "auto_map",
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
)


def write_companions(folder: Path, subject: Subject, merged: Merged) -> None:
    """Write configuration, tokenizer with its template, and the settings of generation with the tokens that stop it.

    The tokenizer's own `eos_token` stays the base's: templates and documents are written with it. It is one of the tokens
    that both `config.json` and `generation_config.json` stop at. Sampling settings of the base are kept.
    """
    form = subject.form
    if form.tokenizer_folder is not None:
        copy_tokenizer(form.tokenizer_folder, folder, form.source)
        if form.source is None:
            (folder / TEMPLATE_FILE).unlink(missing_ok=True)
    tokens = _list_special_tokens(subject, merged.vocabulary)
    sampling = read_json(subject.base / "generation_config.json") or {}
    sampling = {key: value for key, value in sampling.items() if key not in _OF_THE_FILE}
    write_json(folder / "config.json", describe_config(subject, merged) | tokens)
    write_json(folder / "generation_config.json", sampling | tokens)
    for file in sorted(subject.base.glob("LICEN[CS]E*")):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def check_vocabulary(subject: Subject, rows: int) -> None:
    """Check that the tables have a row for every token of the tokenizer.

    Raises:
        ExportError: an adapter brings a tokenizer with more tokens. A base that has more is only warned of.
    """
    folder = subject.form.tokenizer_folder
    if folder is None:
        return
    vocabulary = load_tokenizer_file(folder, needs_padding=False).get_vocab()
    beyond = sorted((token, text) for text, token in vocabulary.items() if token >= rows)
    if not beyond:
        return
    fault = (
        f"{folder}: its tokenizer has {describe_count(len(beyond), 'token')} beyond the {describe_count(rows, 'row')} of the embedding table (first: {beyond[0][1]!r}, "
        f"{beyond[0][0]}), with which the model would fail"
    )
    if folder != subject.base:
        raise ExportError(
            f"{fault}; train with the tables enlarged (modules_to_save: embed_tokens, lm_head), or remove the tokenizer files "
            "from this folder to export with those of the base"
        )
    logger.warning("%s", fault)


def _list_special_tokens(subject: Subject, rows: int) -> dict[str, Any]:
    """Return the ids of bos, pad and the stop tokens: those of the tokenizer, or of the base's configuration where it has none."""
    form, stored = subject.form, read_config(subject.base)
    stops = form.list_stops(subject.base)
    bos, pad = stored.get("bos_token_id"), stored.get("pad_token_id")
    if form.tokenizer_folder is not None:
        tokenizer = load_tokenizer_file(form.tokenizer_folder, needs_padding=False)
        bos = tokenizer.bos_token_id
        # transformers cannot build a table without the row of the token that pads.
        pad = pad if (tokenizer.pad_token_id or 0) >= rows else tokenizer.pad_token_id
    return {"bos_token_id": bos, "eos_token_id": stops or None, "pad_token_id": pad}


def describe_config(subject: Subject, merged: Merged) -> dict[str, Any]:
    """Return the configuration of an export, without its special tokens."""
    stored = read_config(subject.base)
    if subject.architecture == "yulanmini":
        config = describe_llama_config(parse_native_config(stored, subject.base), merged.dtype)
    else:
        config = {key: value for key, value in stored.items() if key not in _STALE_KEYS}
        config |= {
            "architectures": ["LlamaForCausalLM"],
            "dtype": name_dtype(merged.dtype),
            "torch_dtype": name_dtype(merged.dtype),
            "tie_word_embeddings": merged.ties_head,
        }
    config["vocab_size"] = merged.vocabulary
    lineage = subject.result.lineage
    if lineage is not None and lineage.max_positions is not None:
        config["max_position_embeddings"] = lineage.max_positions
    return config | _describe_rope(config, lineage)


def _describe_rope(config: dict[str, Any], lineage: Lineage | None) -> dict[str, Any]:
    """Return RoPE's keys in both forms, with the base that the run was trained with.

    transformers 5 writes and prefers `rope_parameters`. transformers 4 and mlx-lm read `rope_theta` and `rope_scaling` only, and
    take 10,000 where there is none.
    """
    rope = read_rope(config)
    if lineage is not None and lineage.rope_theta is not None:
        rope["rope_theta"] = lineage.rope_theta
    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    return keys if rope["rope_type"] == "default" else {**keys, "rope_scaling": rope}
