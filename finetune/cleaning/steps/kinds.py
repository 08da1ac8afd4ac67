"""Name the kind of each row by a small classifier: a folder with weights in safetensors, whose configuration names the kinds."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetune.cleaning.row_spool import Candidate
from finetune.cleaning.step_form import CleanContext
from finetune.errors import RecipeError
from finetune.files.cache import find_cache, hash_file
from finetune.files.safety.keyed_store import KeyedStore
from finetune.models.precision import choose_device

_BATCH, _FEWEST_LABELS = 16, 2
# The library's number for a tokenizer without a limit of its own is about 1e30.
_LONGEST = 4096


@dataclass(frozen=True)
class Classifier:
    """A model that gives one label to a text; `longest` is the number of tokens of a text that it reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    longest: int

    def name_labels(self, texts: Sequence[str]) -> list[str]:
        """Return the likeliest label of each text."""
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            best = self.model(**inputs).logits.argmax(dim=-1).tolist()
        return [str(self.model.config.id2label[number]) for number in best]


def _open_classifier(folder: Path) -> Classifier:
    """Open a folder of weights. Code in it is not run, and weights that are no safetensors are not read."""
    where = f"clean.mix.classifier: {folder}"
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError, ImportError) as error:
        raise RecipeError("clean", [f"{where}: cannot be opened as a classifier: {error}"]) from error
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise RecipeError("clean", [f"{where}: lacks the weights {names}, so it is no trained classifier"])
    if model.config.num_labels < _FEWEST_LABELS:
        raise RecipeError("clean", [f"{where}: gives a number and no label; name a classifier of at least two labels"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", _LONGEST), _LONGEST)
    return Classifier(model.to(choose_device()).eval(), tokenizer, longest)


def name_kinds(context: CleanContext, rows: Sequence[Candidate], folder: Path) -> Iterator[str]:
    """Yield the label of the question and the answer of each row. Labels are kept in the cache.

    Raises:
        RecipeError: the folder holds no classifier, or a share is for a label that it does not have.
    """
    classifier = _open_classifier(folder)
    labels = set(map(str, classifier.model.config.id2label.values()))
    if not any(name in labels or name.rpartition(" ")[0] in labels for name in context.section.mix.shares):
        raise RecipeError(
            "clean", [f"clean.mix.shares: names no label of {folder}; it has {', '.join(sorted(labels))}"]
        )
    identity = "".join(hash_file(file) for file in sorted(folder.iterdir()) if file.is_file())
    store = KeyedStore(find_cache() / "kinds.sqlite")
    try:
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            contents = [context.spool.read(row) for row in part]
            texts = ["\n".join(filter(None, (content.question, content.trained))) for content in contents]
            keys = [hashlib.sha256(f"{identity} {text}".encode(errors="surrogatepass")).hexdigest() for text in texts]
            known = {key: label for key in keys if (label := store.get(key)) is not None}
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
            if missing:
                for key, label in zip(missing, classifier.name_labels(list(missing.values())), strict=True):
                    store.put(key, label)
                    known[key] = label
            yield from (known[key] for key in keys)
    finally:
        store.close()
