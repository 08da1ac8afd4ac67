"""Export a run: base + adapter → Llama shards, reopened and compared, or nothing at all."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.data.template import ChatTemplate, find_template, list_stop_tokens
from finetune.errors import ExportError
from finetune.export.adapter import read_adapter
from finetune.export.card import write_card
from finetune.export.verify import Comparison, Sources, check_generation, compare_logits, compare_tensors
from finetune.folders import check_output_free, write_folder
from finetune.starts import fingerprint_checkpoint
from finetune.train.model import load_tokenizer
from finetune.train.record import Result, find_base
from finetune.yulan.folding import DTYPES, copy_tokenizer
from finetune.yulan.layout import read_config
from finetune.yulan.shards import TensorSpec, write_shards
from finetune.yulan.tensors import TensorFolder, open_tensors

# These belong to how the base was stored or loaded once, not to the exported weights.
_STALE_KEYS = ("quantization_config", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class ExportSettings:
    """How to write: `dtype` may be `auto` (as the base is stored); `max_shard_bytes` limits a file."""

    dtype: str
    max_shard_bytes: int
    verify: bool


@dataclass(frozen=True)
class ExportReport:
    """What was written; `verify` is None where the comparison was skipped."""

    output: Path
    dtype: str
    bytes: int
    seconds: float
    verify: Comparison | None


@dataclass(frozen=True)
class Merged:
    """The tensors to be exported, computed when asked for and rounded once."""

    tensors: TensorFolder
    merge: Callable[[str, torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    changes_nothing: bool

    def produce(self, name: str) -> torch.Tensor:
        """Return one exported tensor."""
        return self.merge(name, self.tensors.read(name)).to(self.dtype)


def export_result(result: Result, output: Path, settings: ExportSettings) -> ExportReport:
    """Write a result as a Llama folder, reopen it and compare.

    Raises:
        ExportError: the adapter does not fit its base, or what was written is not what was trained; nothing is left.
        OutputError: the output folder is not empty or cannot be written.
    """
    started = time.monotonic()
    check_output_free(output)
    base = find_base(result) if result.kind == "adapter" else result.folder
    merged = _open_merged(result, base, settings.dtype)
    specs = [TensorSpec(name, merged.tensors.shape(name), merged.dtype) for name in merged.tensors.names]
    with write_folder(output) as folder:
        size = write_shards(folder, specs, merged.produce, settings.max_shard_bytes)
        template = _write_companions(folder, result, base, merged.dtype)
        comparison = None
        if settings.verify:
            compare_tensors(folder, merged.produce)
            check_generation(folder, template)
            sources = Sources(base, result.folder if result.kind == "adapter" else None)
            comparison = compare_logits(folder, sources, result.rows, template, merged.dtype)
        report = ExportReport(output, _name_dtype(merged.dtype), size, round(time.monotonic() - started, 1), comparison)
        _write_json(folder / "export.json", _describe_for_machines(report, result, base))
        write_card(folder, result, template, comparison, changes_nothing=merged.changes_nothing)
    return report


def _open_merged(result: Result, base: Path, dtype: str) -> Merged:
    tensors = open_tensors(base)
    stored = tensors.dtype("model.embed_tokens.weight")
    chosen = stored if dtype == "auto" else DTYPES[dtype]
    if result.kind == "model":
        return Merged(tensors, lambda name, tensor: tensor, chosen, False)
    adapter = read_adapter(result.folder, tensors)
    return Merged(tensors, adapter.merge_tensor, chosen, adapter.is_empty)


def _write_companions(folder: Path, result: Result, base: Path, dtype: torch.dtype) -> ChatTemplate:
    """Write configuration, tokenizer with the run's template, and the tokens that stop generation."""
    config = {key: value for key, value in read_config(base).items() if key not in _STALE_KEYS}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": _name_dtype(dtype), "torch_dtype": _name_dtype(dtype)}
    _write_json(folder / "config.json", config)
    with_tokenizer = result.folder if (result.folder / "tokenizer_config.json").is_file() else base
    copy_tokenizer(with_tokenizer, folder)
    tokenizer = load_tokenizer(folder)
    template = find_template("auto", tokenizer)
    if result.origin is not None and template.fingerprint != result.origin.template_fingerprint:
        raise ExportError(
            f"{result.folder}: its chat template is not the one that it was trained with ({result.origin.template}); "
            "restore chat_template.jinja, or train again"
        )
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    stops = list_stop_tokens(tokenizer, template)
    end_of_turn = tokenizer.get_vocab().get("<|eot_id|>")
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted({*stops, *([] if end_of_turn is None else [end_of_turn])}),
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write_json(folder / "generation_config.json", generation)
    return template


def _describe_for_machines(report: ExportReport, result: Result, base: Path) -> dict[str, Any]:
    return {
        "dtype": report.dtype,
        "bytes": report.bytes,
        "result": str(result.folder),
        "origin": asdict(result.origin) if result.origin else None,
        "base": str(base),
        "base_fingerprint": fingerprint_checkpoint(base),
        "verify": asdict(report.verify) if report.verify else None,
    }


def describe_export(report: ExportReport) -> str:
    """Return the report as text for a person."""
    lines = [f"{report.output}: {report.bytes / 1e6:,.1f} MB of {report.dtype} in {report.seconds:.1f} s"]
    if report.verify is None:
        return "\n".join([*lines, "not compared (--no-verify)"])
    verify = report.verify
    lines.append(
        f"equal to what was trained: every tensor to the bit; logits differ by at most {verify.max_abs:.1e} "
        f"(KL {verify.kl:.1e}, same likeliest token {verify.top1_agreement:.1%}) on {verify.rows} rows"
    )
    return "\n".join([*lines, f"talk to it: finetune chat {report.output}"])


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
