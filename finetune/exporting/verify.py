"""Reopen an export in transformers and compare it with what was trained.

Tensors are compared to the bit. Logits are compared on real rows, in float32, between two independent paths: the base model with
the adapter applied live by PEFT, and the exported folder in unchanged transformers.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.data.encoding.gates import IGNORED_LABEL
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import ExportError
from finetune.exporting.companion_checks import check_generation, compare_tokens
from finetune.exporting.merged import Merged, Subject, is_quantized, requantize
from finetune.exporting.proof import BaseKind, BaseScore, BaseScores, Comparison
from finetune.models.loading import load_base
from finetune.models.lora import apply_adapter, disable_adapter
from finetune.models.opening import open_trained
from finetune.models.precision import Precision, choose_device
from finetune.runs.lineage import recall_model
from finetune.runs.results import SampleRow
from finetune.runs.trained_tokens import encode_bundled_texts, make_bundled_samples
from finetune.yulan.layout import read_config
from finetune.yulan.shards import Piece, list_pieces, run_pieces
from finetune.yulan.tensors import WEIGHT_DTYPES, open_tensors

# Merging in float32 and applying the adapter live differ in the order of sums only.
_FLOAT32_TOLERANCE = 1e-4
# Rounding the weights to 16 bits moves logits by 2 to 7 % of their spread (measured on published checkpoints), which is
# a KL of order 1e-3; without its adapter, an export would differ by the adapter's whole effect.
_ROUNDED_KL = 0.02
_ROUNDED_SHARE_OF_EFFECT = 0.25
_MOST_POSITIONS = 512  # 200 MB of logits where the vocabulary has 99,000 tokens
_RANDOM_ROWS, _RANDOM_TOKENS = 8, 64
_ROOM = 1.3  # memory for the weights and the logits of the longest row, in sizes of the weights


@dataclass(frozen=True)
class _Output:
    """The output of one model: its loss over all trained tokens, and logits of some, (positions, vocabulary)."""

    loss: float
    tokens: int
    logits: torch.Tensor


@dataclass(frozen=True)
class _Expected:
    """The output that an export must equal, and the logits of the base model without the adapter, if there is one."""

    output: _Output
    base_logits: torch.Tensor | None


@dataclass
class LogitVerifier:
    """Runs one model at a time over the sample rows of a result, and keeps some of their logits."""

    _expected: dict[BaseKind, _Expected] = field(default_factory=dict)

    def measure_bases(self, subject: Subject) -> BaseScores:
        """Compare the adapter on its quantized base with its merges into the full and the dequantized base."""
        rows = _list_rows(subject)
        trained = _run_rows(open_trained(subject.result).model, rows)
        scores = {}
        for kind in ("full", "dequantized"):
            merged = self._run_expected(subject, kind).output
            scores[kind] = BaseScore(
                loss=merged.loss,
                kl=_measure_kl(trained.logits, merged.logits),
                top1_agreement=_measure_agreement(trained.logits, merged.logits),
            )
        return BaseScores(trained.loss, scores["full"], scores["dequantized"], len(rows), trained.tokens)

    def compare(self, folder: Path, subject: Subject, merged: Merged) -> Comparison:
        """Reopen an export: every tensor to the bit, tokens, generation settings, and logits on real rows.

        Raises:
            ExportError: it is not what was trained.
        """
        compare_tensors(folder, merged)
        check_generation(folder, subject)
        texts = compare_tokens(folder, subject)
        kind: BaseKind = "full" if merged.quantize == "none" else "dequantized"
        expected = self._run_expected(subject, kind)
        trained, base_logits = expected.output.logits, expected.base_logits
        rows = _list_rows(subject)
        exported = _run_rows(_load(folder), rows).logits
        comparison = Comparison(
            max_abs=(trained - exported).abs().max().item(),
            kl=_measure_kl(trained, exported),
            top1_agreement=_measure_agreement(trained, exported),
            rows=len(rows),
            positions=trained.shape[0],
            effect_kl=None if base_logits is None else _measure_kl(trained, base_logits),
            texts=texts,
        )
        _check(comparison, trained, merged.dtype)
        return comparison

    def _run_expected(self, subject: Subject, kind: BaseKind) -> _Expected:
        """Run the model that an export must equal: the base in float32, with the adapter applied live by PEFT."""
        if kind not in self._expected:
            rows, model = _list_rows(subject), _load_base(subject, kind)
            if subject.adapter is None:
                self._expected[kind] = _Expected(_run_rows(model, rows), None)
            else:
                tuned = apply_adapter(model, subject.adapter).eval()
                output = _run_rows(tuned, rows)
                with disable_adapter(tuned):
                    self._expected[kind] = _Expected(output, _run_rows(tuned, rows).logits)
        return self._expected[kind]


def compare_tensors(folder: Path, merged: Merged) -> None:
    """Reopen the written weights and compare each tensor with the merge, computed once more.

    Raises:
        ExportError: a tensor differs in at least one bit, or is not finite.
    """
    written = open_tensors(folder)

    def measure(piece: Piece) -> tuple[str, float | None]:
        expected, found = merged.make_rows(piece), written.read_rows(piece.name, piece.start, piece.stop)
        if not found.isfinite().all():
            raise ExportError(
                f"export: {piece.name} holds NaN or infinite values as {found.dtype}; nothing was left in the output; "
                "export with --dtype bfloat16 or float32"
            )
        is_equal = torch.equal(_view_bits(found), _view_bits(expected))
        return piece.name, None if is_equal else (found.float() - expected.float()).abs().max().item()

    wrong: dict[str, float] = {}
    for name, difference in run_pieces(list_pieces(merged.specs, merged), measure):
        if difference is not None:
            wrong[name] = max(difference, wrong.get(name, 0.0))
    if wrong:
        name, difference = next(iter(wrong.items()))
        raise ExportError(
            f"export: {len(wrong)} tensors differ after reopening (first: {name}, max difference {difference:.2g}); "
            "nothing was left in the output; check the disk, and export again"
        )


def _view_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _list_rows(subject: Subject) -> Sequence[SampleRow]:
    """Return the sample rows of the run, or bundled rows for an adapter without any; random ones where there is no tokenizer."""
    if subject.result.rows:
        return subject.result.rows
    form = subject.form
    if form.tokenizer_folder is None:
        generator = torch.Generator().manual_seed(0)
        size = (_RANDOM_ROWS, _RANDOM_TOKENS)
        rows = torch.randint(read_config(subject.base)["vocab_size"], size, generator=generator).tolist()
    else:
        tokenizer = load_tokenizer(form.tokenizer_folder, needs_padding=False)
        if form.template is None:
            rows = [ids for ids in encode_bundled_texts(tokenizer) if len(ids) > 1]
        else:
            samples = make_bundled_samples(tokenizer, form.template)
            rows = [side for sample in samples for side in sample.token_ids]
    return [SampleRow(ids, ids) for ids in rows]


def _load_base(subject: Subject, kind: BaseKind) -> PreTrainedModel:
    """Load the base in float32; for `dequantized`, its matrices get the values that they had in training."""
    lineage = subject.result.lineage
    section = replace(recall_model(subject.result, subject.base), quantize="none")
    model = load_base(subject.base, section, Precision(torch.float32, "no"), torch.device("cpu"))
    if kind == "dequantized" and lineage is not None:
        dtype = WEIGHT_DTYPES[lineage.dtype]
        for name, parameter in model.named_parameters():
            if is_quantized(name):
                parameter.data = requantize(parameter.data, subject.quantize, dtype)
    return model.eval()


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def _run_rows(model: PreTrainedModel | PeftModel, rows: Sequence[SampleRow]) -> _Output:
    """Run a model over rows, one at a time, on the GPU where it fits."""
    device = _find_room(model)
    model = model.to(device) if model.device != device else model
    share = max(1, _MOST_POSITIONS // len(rows))
    total, tokens, kept = 0.0, 0, []
    with torch.inference_mode():
        for row in rows:
            labels = torch.tensor(row.labels[1:])
            positions = (labels != IGNORED_LABEL).nonzero().flatten()
            if len(positions) == 0:
                continue
            ids = torch.tensor([row.input_ids], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, positions.to(device)].float().cpu()
            total += torch.nn.functional.cross_entropy(logits, labels[positions], reduction="sum").item()
            tokens += len(positions)
            kept.append(logits[:share].clone())
    del model
    gc.collect()
    return _Output(total / tokens, tokens, torch.cat(kept))


def _find_room(model: PreTrainedModel | PeftModel) -> torch.device:
    """Return the GPU where the model fits into its free memory, else the device that the model is on."""
    device, here = choose_device(), torch.device(model.device)
    if device.type != "cuda" or here == device:
        return here
    free, _ = torch.cuda.mem_get_info(device)
    return device if free > _ROOM * model.get_memory_footprint() else here


def _measure_agreement(expected: torch.Tensor, found: torch.Tensor) -> float:
    return (expected.argmax(-1) == found.argmax(-1)).double().mean().item()


def _measure_kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL(expected || found) in nats, computed in float64 a few rows at a time."""
    total = 0.0
    for first, second in zip(expected.split(32), found.split(32), strict=True):
        log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(0.0, total / expected.shape[0])


def _check(comparison: Comparison, trained: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        limit = _FLOAT32_TOLERANCE * max(1.0, trained.std().item())
        # The likeliest token may differ where two are equally likely, so only the size of the difference counts.
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
