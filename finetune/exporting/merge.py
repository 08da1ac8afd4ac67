"""Export a run: merge base and adapter into Llama weights, reopen them and compare; a failed export leaves nothing."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, describe_count
from finetune.exporting.card import write_card
from finetune.exporting.companions import check_vocabulary, write_companions
from finetune.exporting.gguf.conversion import describe_gguf, write_file
from finetune.exporting.gguf.llama_folder import open_llama_folder
from finetune.exporting.merged import Subject, open_merged, open_subject
from finetune.exporting.proof import BaseKind, BaseScores, ExportReport, GgufReport, describe_tolerance
from finetune.files.folders import check_output_free, write_folder
from finetune.files.json_files import write_json
from finetune.runs.export_settings import ExportSettings, list_refusals
from finetune.runs.results import Result
from finetune.runs.run_files import EXPORT_REPORT_FILE
from finetune.runs.trained_tokens import has_files_of_base, open_tokenizer
from finetune.yulan.shards import write_shards
from finetune.yulan.tensors import name_dtype

if TYPE_CHECKING:  # an export without a comparison need not load the model libraries
    from finetune.exporting.gguf.llama_cpp import LlamaCppProver
    from finetune.exporting.verify import LogitVerifier

logger = logging.getLogger(__name__)


def export_result(
    result: Result,
    output: Path,
    settings: ExportSettings,
    verifier: LogitVerifier | None = None,
    prover: LlamaCppProver | None = None,
    *,
    base_model: str | None = None,
) -> ExportReport:
    """Write a result as a Llama folder, and as GGUF files beside it where the settings name types.

    With a verifier the folder is reopened and compared, and with a prover each GGUF file is run in llama.cpp.

    `base_model` names the base of an adapter where it is not where the adapter's own records say.

    Raises:
        ExportError: the adapter does not fit its base, or the export is not what was trained; no output is left.
        TemplateError: the chat template is not the one of the training; no output is left.
        OutputError: the output folder is not empty or cannot be written.
    """
    started = time.monotonic()
    check_output_free(output)
    subject = open_subject(result, base_model)
    _check_base(subject, settings, verifier is not None)
    # Before the models are run: an adapter, a template or a tokenizer that does not fit is then refused at once.
    _check_tokenizer(subject)
    merged = open_merged(subject, settings.dtype, dequantized=settings.base == "dequantized")
    check_vocabulary(subject, merged.vocabulary)
    bases = verifier.measure_bases(subject, merged) if verifier and subject.quantize != "none" else None
    kind: BaseKind = "full" if settings.base == "auto" else settings.base
    if settings.base == "auto" and bases is not None and bases.better != kind:
        kind = bases.better
        merged = replace(merged, quantize=subject.quantize)
    with write_folder(output) as folder:
        size = write_shards(folder, merged.specs, merged, settings.max_shard_bytes)
        write_companions(folder, subject, merged)
        comparison = verifier.compare(folder, subject, merged) if verifier else None
        files = _write_gguf_files(folder, output, result, settings, prover)
        seconds = round(time.monotonic() - started, 1)
        report = ExportReport(output, name_dtype(merged.dtype), kind, size, seconds, bases, comparison, files)
        write_json(folder / EXPORT_REPORT_FILE, _make_json_report(report, subject))
        write_card(folder, subject, report, changes_nothing=merged.changes_nothing)
    return report


def _write_gguf_files(
    folder: Path, output: Path, result: Result, settings: ExportSettings, prover: LlamaCppProver | None
) -> tuple[GgufReport, ...]:
    """Write the export as GGUF files beside its weights, from the weights as they were written."""
    if not settings.gguf:
        return ()
    source = open_llama_folder(folder, result.texts)
    reports = []
    for name in dict.fromkeys(settings.gguf):
        file = folder / f"model-{name}.gguf"
        report = write_file(source, file, name, prover, verify=settings.verify)
        reports.append(replace(report, output=output / file.name))
    return tuple(reports)


def _check_base(subject: Subject, settings: ExportSettings, verifies: bool) -> None:
    for reason in list_refusals(settings, subject.quantize, subject.init, verifies=verifies, is_stage=False):
        raise ExportError(f"{subject.result.folder}: {reason}")


def _check_tokenizer(subject: Subject) -> None:
    """Compare the template with the trained one, and the tokenizer with it where its files are not those of the base.

    Raises:
        FinetuneError: it is another template, or gives other tokens.
    """
    if subject.form.tokenizer_folder is not None and not has_files_of_base(subject.result, subject.base):
        open_tokenizer(subject.result, subject.base, needs_padding=subject.result.lineage is not None)
    if subject.lost_legacy is not None:
        logger.warning("%s: %s", subject.form.tokenizer_folder, subject.lost_legacy)


def _make_json_report(report: ExportReport, subject: Subject) -> dict[str, Any]:
    result = subject.result
    return {
        "dtype": report.dtype,
        "bytes": report.bytes,
        "result": str(result.folder),
        "origin": asdict(result.lineage) if result.lineage else None,
        "base": str(subject.base),
        "base_commit": result.lineage.commit if result.lineage else None,
        "base_fingerprint": result.lineage.base_fingerprint if result.lineage else None,
        "merged_into": report.base,
        "bases": asdict(report.bases) if report.bases else None,
        "verify": asdict(report.verify) if report.verify else None,
        "gguf": [{**asdict(file), "output": file.output.name} for file in report.gguf],
    }


def describe_export(report: ExportReport) -> str:
    """Return the report as text for a person."""
    lines = [f"{report.output}: {report.bytes / 1e6:,.1f} MB of {report.dtype} in {report.seconds:.1f} s"]
    if report.bases is not None:
        lines.append(_describe_bases(report.bases, report.base))
    if report.verify is None:
        return "\n".join([*lines, "not compared with what was trained", *map(describe_gguf, report.gguf)])
    verify = report.verify
    lines.append(
        f"equal to what was trained: every tensor to the bit; logits differ by at most {verify.max_abs:.1e} "
        f"(KL {verify.kl:.1e}, same likeliest token {verify.top1_agreement:.1%}) on {describe_count(verify.rows, 'row')}; "
        f"{describe_tolerance(verify, report.dtype)}"
    )
    if verify.texts:
        lines.append(
            f"the reopened tokenizer gives the tokens that were trained, on {describe_count(verify.texts, 'row')}"
        )
    lines += map(describe_gguf, report.gguf)
    return "\n".join([*lines, f"talk to it: finetune chat {report.output}"])


def _describe_bases(bases: BaseScores, chosen: BaseKind) -> str:
    parts = [f"{bases.trained_loss:.4f} as trained"]
    for name, score in (("full", bases.full), ("dequantized", bases.dequantized)):
        parts.append(f"{score.loss:.4f} merged into the {name} base ({score.top1_agreement:.1%} same likeliest token)")
    text = f"held-out loss: {', '.join(parts)}; written: {chosen}"
    return text if bases.better == chosen else f"{text}; --base {bases.better} would have the lower loss"
