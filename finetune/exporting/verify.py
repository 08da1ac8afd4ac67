"""Reopen an export in transformers and compare it with what was trained.

Tensors are compared to the bit. Logits are compared on real rows, in float32, between two independent paths: the base model with
the adapter applied live by PEFT, and the exported folder in unchanged transformers. Both are read from the disk a layer at a time.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.errors import ExportError, describe_count
from finetune.exporting.companion_checks import check_generation, compare_tokens
from finetune.exporting.comparing.outputs import (
    cut_rows,
    measure_agreement,
    measure_difference,
    measure_kl,
    run_rows,
)
from finetune.exporting.comparing.rounding import (
    check_comparison,
    find_float32_limit,
    find_rounded_limit,
    read_with_errors,
)
from finetune.exporting.merged import Merged, Subject, is_quantized, requantize
from finetune.exporting.proof import BaseKind, BaseScore, BaseScores, Comparison
from finetune.models.loading import load_base
from finetune.models.lora import disable_adapter
from finetune.models.opening import open_trained
from finetune.models.precision import Precision, choose_device
from finetune.models.streaming.from_disk import ReadTensor, read_stored, stream_model
from finetune.runs.lineage import recall_model
from finetune.runs.results import SampleRow
from finetune.runs.trained_tokens import encode_bundled_texts, make_bundled_samples
from finetune.yulan.layout import read_config
from finetune.yulan.shards import Piece, RowSource, TensorSpec, list_pieces, run_pieces
from finetune.yulan.tensors import WEIGHT_DTYPES, TensorFolder, open_tensors

_RANDOM_ROWS, _RANDOM_TOKENS = 8, 64


class LogitVerifier:
    """Runs one model at a time over the sample rows of a result, and compares some of their logits."""

    def measure_bases(self, subject: Subject, merged: Merged) -> BaseScores:
        """Compare the adapter on its quantized base with its merges into the full and the dequantized base."""
        rows = list_rows(subject)
        # It is run as it was trained: in memory, and each row alone, because int8 chooses outliers for a batch as a whole.
        trained = run_rows(open_trained(subject.result).model, rows, batches=False)
        scores = {}
        for kind in ("full", "dequantized"):
            found = run_rows(_open_trained(subject, merged.tensors, kind), rows)
            scores[kind] = BaseScore(
                loss=found.loss,
                kl=measure_kl(trained.logits, found.logits),
                top1_agreement=measure_agreement(trained.logits, found.logits),
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
        comparison = replace(compare_logits(folder, subject, merged), texts=texts)
        check_comparison(comparison, merged.dtype)
        return comparison


def list_rows(subject: Subject) -> Sequence[SampleRow]:
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


def compare_logits(folder: Path, subject: Subject, merged: Merged) -> Comparison:
    """Compare the logits of an export with those of the model that was trained, and measure how far they may differ.

    Raises:
        ExportError: transformers does not find its tensors in the folder.
    """
    rows = cut_rows(list_rows(subject))
    trained, effect = _run_trained(subject, merged, rows)
    written = open_tensors(folder)
    exported = _run_export(folder, read_stored(written), rows)
    comparison = Comparison(
        max_abs=measure_difference(trained, exported),
        kl=measure_kl(trained, exported),
        top1_agreement=measure_agreement(trained, exported),
        rows=len(rows),
        positions=trained.shape[0],
        effect_kl=effect,
        rounding_kl=None,
        tolerance=find_float32_limit(trained),
    )
    del trained  # room for the next logits
    if merged.dtype == torch.float32:
        return comparison
    rounded = measure_kl(exported, _run_export(folder, read_with_errors(written, merged), rows))
    return replace(comparison, rounding_kl=rounded, tolerance=find_rounded_limit(rounded))


def _run_trained(subject: Subject, merged: Merged, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, float | None]:
    """Return the logits of the model that an export must equal, and the KL of its base without the adapter, if there is one."""
    model = _open_trained(subject, merged.tensors, "full" if merged.quantize == "none" else "dequantized")
    logits = run_rows(model, rows).logits
    if subject.adapter is None:
        return logits, None
    with disable_adapter(model):
        return logits, measure_kl(logits, run_rows(model, rows).logits)


class WrittenTensors(RowSource, Protocol):
    """What was written: its tensors, and how to compute them once more."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The names, shapes and types."""


def compare_tensors(folder: Path, merged: WrittenTensors) -> None:
    """Reopen the written weights and compare each tensor with what it was made of, computed once more.

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
            f"export: {describe_count(len(wrong), 'tensor differs', 'tensors differ')} after reopening (first: {name}, max difference {difference:.2g}); "
            "nothing was left in the output; check the disk, and export again"
        )


def _view_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _open_trained(subject: Subject, tensors: TensorFolder, kind: BaseKind) -> Any:
    """Open the base in float32, with the adapter applied live by PEFT; for `dequantized`, matrices get the values of the training."""
    section = replace(recall_model(subject.result, subject.base), quantize="none")
    model = load_base(subject.base, section, Precision(torch.float32, "no"), torch.device("meta"))
    read, lineage = read_stored(tensors), subject.result.lineage
    if kind == "dequantized" and lineage is not None:
        read = _requantize(read, subject.quantize, WEIGHT_DTYPES[lineage.dtype])
    return stream_model(model, read, choose_device(), subject.adapter)


def _requantize(read: ReadTensor, quantize: str, dtype: torch.dtype) -> ReadTensor:
    def read_quantized(name: str, target: torch.Tensor) -> None:
        read(name, target)
        if is_quantized(name):
            target.copy_(requantize(target, quantize, dtype))

    return read_quantized


def _run_export(folder: Path, read: ReadTensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Reopen an export and return its logits: its classes and settings are read by transformers, its tensors by `read`.

    Raises:
        ExportError: transformers misses tensors, or finds others.
    """
    gc.collect()  # of an earlier model, which holds memory and refers to itself
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, device_map="meta", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if faults := [f"{key}: {sorted(names, key=str)[0]}" for key, names in found.items() if names]:
        raise ExportError(
            f"export: transformers does not find its tensors in the written folder ({'; '.join(faults)}); nothing was left in the output"
        )
    return run_rows(stream_model(model, read, choose_device()), rows).logits
