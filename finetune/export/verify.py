"""Reopen an export as anybody would and compare it with what was trained.

Tensors are compared to the bit. Logits are compared on real rows between two independent paths: the full-precision base
with the adapter applied live by PEFT, and the exported folder in stock transformers, both in float32.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from finetune.data.files import read_file
from finetune.data.gates import IGNORED_LABEL
from finetune.data.rows import FORMATS, read_row
from finetune.data.template import ChatTemplate, encode_conversations, encode_prompt, list_stop_tokens
from finetune.errors import ExportError
from finetune.resources import find_demo_data
from finetune.train.model import load_tokenizer
from finetune.train.record import SampleRow
from finetune.yulan.tensors import open_tensors

# Merging in float32 and applying the adapter live differ by the order of sums only.
_FLOAT32_TOLERANCE = 1e-4
# Rounding the weights to 16 bits moves logits by 2 to 7 % of their spread (measured on the reference checkpoints), which is
# a KL of order 1e-3; an adapter that got lost moves them by its whole effect.
_ROUNDED_KL = 0.02
_ROUNDED_SHARE_OF_EFFECT = 0.25
_PROMPT = ({"role": "user", "content": "a"},)
_MOST_ROWS = 16
_MOST_POSITIONS = 512  # of up to 99,000 logits each: 200 MB


@dataclass(frozen=True)
class Comparison:
    """How near an export is to what was trained; `effect_kl` is how far the adapter had moved its base.

    `max_abs` is the largest difference of a logit, `kl` the mean KL(trained || export) in nats, `top1_agreement` the share of
    positions with the same likeliest token.
    """

    max_abs: float
    kl: float
    top1_agreement: float
    rows: int
    positions: int
    effect_kl: float | None


@dataclass(frozen=True)
class Sources:
    """What was trained: a Llama folder, and the adapter on it, if any."""

    base: Path
    adapter: Path | None


def compare_tensors(folder: Path, produce: Callable[[str], torch.Tensor]) -> None:
    """Reopen the written weights and compute each again.

    Raises:
        ExportError: a tensor differs, by a single bit.
    """
    written = open_tensors(folder)
    wrong = []
    for name in written.names:
        found, expected = written.read(name), produce(name)
        if not torch.equal(_view_bits(found), _view_bits(expected)):
            wrong.append((name, (found.float() - expected.float()).abs().max().item()))
        if not found.isfinite().all():
            raise ExportError(
                f"export: {name} holds NaN or infinite values as {found.dtype}; nothing was left in the output; "
                "export with --dtype bfloat16 or float32"
            )
    if wrong:
        name, difference = wrong[0]
        raise ExportError(
            f"export: {len(wrong)} tensors differ after reopening (first: {name}, max difference {difference:.2g}); "
            "nothing was left in the output; is the disk sound?"
        )


def _view_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def check_generation(folder: Path, template: ChatTemplate) -> None:
    """Reopen tokenizer and generation settings as a server does: the same prompt, and an end at every stop token.

    Raises:
        ExportError: an answer would not end where it was trained to, or be asked for in another form.
    """
    tokenizer = load_tokenizer(folder)
    written = GenerationConfig.from_pretrained(folder, local_files_only=True)
    stops = {written.eos_token_id} if isinstance(written.eos_token_id, int) else set(written.eos_token_id or ())
    faults = []
    if missing := sorted(set(list_stop_tokens(tokenizer, template)) - stops):
        faults.append(
            f"generation_config.json stops at {sorted(stops)} and lacks {missing}, which end a trained answer"
        )
    if written.pad_token_id in stops:
        faults.append(f"generation_config.json pads with the stop token {written.pad_token_id}")
    asked = tokenizer.apply_chat_template(_PROMPT, add_generation_prompt=True, tokenize=True, return_dict=True)
    if asked["input_ids"] != encode_prompt(tokenizer, template, _PROMPT):
        faults.append("the written chat template does not render a prompt as it was trained")
    if faults:
        raise ExportError(f"export: {'; '.join(faults)}; nothing was left in the output")


def compare_logits(
    folder: Path, sources: Sources, rows: Sequence[SampleRow], template: ChatTemplate, dtype: torch.dtype
) -> Comparison:
    """Compare the logits of an export with those of what was trained, one model in memory at a time.

    Raises:
        ExportError: they differ by more than the rounding of `dtype` explains.
    """
    rows = list(rows or _encode_bundled_rows(folder, template))[:_MOST_ROWS]
    trained, untouched = _compute_reference(sources, rows)
    exported = _compute_logits(_load(folder), rows)
    comparison = _compare(trained, exported, untouched, len(rows))
    _check(comparison, trained, dtype)
    return comparison


def _encode_bundled_rows(folder: Path, template: ChatTemplate) -> list[SampleRow]:
    """Return bundled rows, for an adapter that came without rows of its own."""
    tokenizer = load_tokenizer(folder)
    raw = list(read_file(find_demo_data("demo_eval.jsonl")))[:_MOST_ROWS]
    conversations = [read_row(FORMATS["messages"], {}, row, where).messages for where, row in raw]
    return [
        SampleRow(encoded.token_ids, encoded.token_ids)
        for encoded in encode_conversations(tokenizer, template, conversations)
    ]


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def _compute_reference(sources: Sources, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits as trained and, where there is an adapter, those without it."""
    model = _load(sources.base)
    if sources.adapter is None:
        return _compute_logits(model, rows), None
    tuned = PeftModel.from_pretrained(model, sources.adapter).eval()
    trained = _compute_logits(tuned, rows)
    with tuned.disable_adapter():
        return trained, _compute_logits(tuned, rows)


def _compute_logits(model: PreTrainedModel | PeftModel, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Return the logits that predict trained tokens, as (positions, vocabulary) in float32."""
    share = max(1, _MOST_POSITIONS // len(rows))
    chosen = []
    with torch.inference_mode():
        for row in rows:
            hidden = torch.tensor([row.input_ids])
            positions = [i - 1 for i, label in enumerate(row.labels) if label != IGNORED_LABEL and i > 0][:share]
            if positions:
                chosen.append(model(input_ids=hidden, use_cache=False).logits[0, positions].float().clone())
    del model
    gc.collect()
    return torch.cat(chosen)


def _compare(trained: torch.Tensor, exported: torch.Tensor, untouched: torch.Tensor | None, rows: int) -> Comparison:
    return Comparison(
        max_abs=(trained - exported).abs().max().item(),
        kl=_measure_kl(trained, exported),
        top1_agreement=(trained.argmax(-1) == exported.argmax(-1)).double().mean().item(),
        rows=rows,
        positions=trained.shape[0],
        effect_kl=None if untouched is None else _measure_kl(trained, untouched),
    )


def _measure_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean KL(reference || other) in nats, in float64 a few rows at a time."""
    total = 0.0
    for first, second in zip(reference.split(32), other.split(32), strict=True):
        log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(0.0, total / reference.shape[0])


def _check(comparison: Comparison, trained: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        limit = _FLOAT32_TOLERANCE * max(1.0, trained.std().item())
        # Two tokens can be equally likely; only a difference that float32 does not explain is a fault.
        if comparison.max_abs <= limit:
            return
        reason = f"logits differ by up to {comparison.max_abs:.2g} > {limit:.2g}"
    else:
        limit = _ROUNDED_KL
        if comparison.effect_kl is not None:
            limit = max(min(limit, _ROUNDED_SHARE_OF_EFFECT * comparison.effect_kl), 1e-3)
        if comparison.kl <= limit:
            return
        reason = f"KL {comparison.kl:.2g} > {limit:.2g} (the adapter itself moved its base by {comparison.effect_kl})"
    raise ExportError(
        f"export: the reopened model is not what was trained: {reason}, same likeliest token in "
        f"{comparison.top1_agreement:.1%} of {comparison.positions} positions; nothing was left in the output"
    )
