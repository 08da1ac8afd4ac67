"""The step `complexity`: how long a row is, and how unlikely the base checkpoint finds it.

Source: YuLan-Mini (arXiv 2412.17743), post-training: rows above a threshold of `l1 * length + l2 * loss` are dropped.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence

from tqdm import tqdm

from finetune.checkpoints.finding import fingerprint_checkpoint
from finetune.cleaning.row_spool import Candidate
from finetune.cleaning.step_form import CleanContext, Drop, StepResult
from finetune.data.encoding.rendering import encode_conversations
from finetune.data.encoding.spellings import encode_plain_texts
from finetune.data.lint.text_checks import shorten
from finetune.errors import describe_count
from finetune.files.cache import find_cache, hash_file
from finetune.files.safety.keyed_store import KeyedStore
from finetune.models.opening import LoadedModel, open_model
from finetune.models.row_loss import MarkedTokens, measure_losses
from finetune.runs.lineage import find_training_base
from finetune.runs.run_files import PEFT_WEIGHTS_FILE

_CHUNK_BATCHES = 32


def drop_complex(context: CleanContext, rows: Sequence[Candidate]) -> StepResult:
    """Drop rows whose complexity is above the threshold. Losses are kept in the cache, so a stopped run measures none twice."""
    section, result = context.section.complexity, StepResult()
    losses = _LossCache(context)
    threshold = section.drop_above or 0.0
    size = section.batch_size * _CHUNK_BATCHES
    with tqdm(total=len(rows), unit="row", disable=None, leave=False) as shown:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            for row, loss in zip(part, losses.measure(part), strict=True):
                value = section.length_weight * row.tokens + section.loss_weight * loss
                result.scores[row.number] = {"loss": loss, "complexity": value}
                if value > threshold:
                    text = f"{value:.4g} ({describe_count(row.tokens, 'token')}, loss {loss:.4g}): {shorten(context.spool.read(row).trained)}"
                    result.dropped[row.number] = Drop("above complexity.drop_above", text)
            shown.update(len(part))
    losses.close()
    return result


class _LossCache:
    """Measures losses under the base checkpoint, each once for its tokens and weights."""

    def __init__(self, context: CleanContext) -> None:
        self._context = context
        self._name = context.resolved.recipe.model.checkpoint
        self._weights = fingerprint_weights(context)
        self._store = KeyedStore(find_cache() / "losses.sqlite")
        self._loaded: LoadedModel | None = None

    def measure(self, rows: Sequence[Candidate]) -> list[float]:
        marked = [encode_row(self._context, row) for row in rows]
        keys = [self._make_key(row) for row in marked]
        known = {key: float(text) for key in keys if (text := self._store.get(key)) is not None}
        missing = {key: row for key, row in zip(keys, marked, strict=True) if key not in known}
        if missing:
            self._loaded = self._loaded or open_model(self._name)
            # Rows of about one length share a batch, so that little of it is padding.
            ordered = sorted(missing.items(), key=lambda item: len(item[1].token_ids))
            size = self._context.section.complexity.batch_size
            found = measure_losses(self._loaded.model, [row for _, row in ordered], size)
            for (key, _), loss in zip(ordered, found, strict=True):
                self._store.put(key, repr(loss))
                known[key] = loss
        return [known[key] for key in keys]

    def close(self) -> None:
        self._store.close()

    def _make_key(self, row: MarkedTokens) -> str:
        content = json.dumps([self._weights, list(row.token_ids), [int(mark) for mark in row.trained]])
        return hashlib.sha256(content.encode()).hexdigest()


def fingerprint_weights(context: CleanContext) -> str:
    """Return a hash of the weights that training begins with: the base checkpoint, and the adapter that it continues."""
    adapter = context.resolved.adapter_folder
    own = hash_file(adapter / PEFT_WEIGHTS_FILE) if adapter is not None else ""
    return f"{fingerprint_checkpoint(find_training_base(context.resolved))} {own}"


def encode_row(context: CleanContext, row: Candidate) -> MarkedTokens:
    """Return the tokens of a row as training sees them, without cutting it."""
    content = context.spool.read(row)
    if content.is_text:
        (text,) = encode_plain_texts(context.tokenizer, [content.messages[0]["content"]])
        return MarkedTokens(text.token_ids, list(itertools.repeat(True, len(text.token_ids))))
    encoded = encode_conversations(context.tokenizer, context.template, [content.messages], [content.tools])[0]
    return MarkedTokens(encoded.token_ids, encoded.trained)
