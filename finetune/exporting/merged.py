"""Compute the tensors of an export: read rows of the base, merge the adapter, fold, and round once."""

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer_file
from finetune.errors import ExportError
from finetune.exporting.adapter_changes import Adapter, read_adapter
from finetune.files.folders import check_links
from finetune.runs.lineage import check_template, find_base, find_tokenizer_folder
from finetune.runs.results import Result, check_result_files
from finetune.yulan.folding import Fold, list_llama_tensors
from finetune.yulan.layout import Architecture, find_architecture
from finetune.yulan.llama_files import check_llama
from finetune.yulan.shards import Piece, TensorSpec
from finetune.yulan.tensors import WEIGHT_DTYPES, TensorFolder, name_dtype, open_tensors


@dataclass(frozen=True)
class Subject:
    """A result to export, and what belongs to it; `base` is its folder of base weights, or its own where all were trained."""

    result: Result
    base: Path
    architecture: Architecture
    tokenizer_folder: Path

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, after a check that the result was trained with it.

        Raises:
            TemplateError: the result was trained with another one.
        """
        template = find_template("auto", load_tokenizer_file(self.tokenizer_folder))
        check_template(self.result, template)
        return template

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter, if there is one."""
        return self.result.folder if self.result.kind == "adapter" else None

    @property
    def quantize(self) -> str:
        """The quantization of the base while the adapter was trained on it."""
        lineage = self.result.lineage
        return "none" if lineage is None or self.adapter is None else lineage.quantize


@dataclass(frozen=True)
class Merged:
    """The tensors of an export, computed on demand and rounded once; a `RowSource`."""

    tensors: TensorFolder
    specs: tuple[TensorSpec, ...]
    dtype: torch.dtype
    adapter: Adapter | None
    fold: Fold | None
    quantize: str
    quantized_dtype: torch.dtype

    @property
    def changes_nothing(self) -> bool:
        """Tell whether there is an adapter that has no effect."""
        return self.adapter is not None and self.adapter.is_empty

    def find_stored_name(self, name: str) -> str:
        """Return the name of the base tensor from which an exported one is made."""
        return self.fold.find_stored_name(name) if self.fold else name

    def needs_whole(self, name: str) -> bool:
        """Tell whether a tensor can only be made whole, not row by row."""
        stored = self.find_stored_name(name)
        requantized = self.quantize != "none" and is_quantized(stored)
        return requantized or (self.adapter is not None and self.adapter.needs_whole(stored))

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Read rows of the base and return the exported rows.

        Raises:
            ExportError: some are NaN or infinite.
        """
        name = self.find_stored_name(piece.name)
        rows = self.fold.read_rows(piece) if self.fold else self.tensors.read_rows(name, piece.start, piece.stop)
        if self.quantize != "none" and is_quantized(name):
            rows = requantize(rows, self.quantize, self.quantized_dtype)
        if self.adapter is not None:
            rows = self.adapter.merge_rows(name, piece.start, rows)
        if self.fold:
            return self.fold.fold_rows(piece.name, rows, self.dtype)
        rows = rows.to(self.dtype)
        # Minimum and maximum are NaN if any number is, and computing them needs no second copy.
        if rows.numel() and not torch.stack(torch.aminmax(rows)).isfinite().all():
            raise ExportError(
                f"{piece.name} holds NaN or infinite values as {name_dtype(self.dtype)}; train again from a checkpoint that is whole, "
                "or if the weights only are too large for this type, export with --dtype float32"
            )
        return rows


def open_subject(result: Result) -> Subject:
    """Find the base, the architecture and the tokenizer of a result.

    Raises:
        ExportError: the base has changed since the training, or the result is a reward model.
    """
    if result.is_reward_model:
        raise ExportError(
            f"{result.folder}: is a reward model, and only language models can be exported. Use the "
            "run as it is: `finetune evaluate` measures it on pairs"
        )
    check_result_files(result)
    check_links(result.folder)
    base = find_base(result) if result.kind == "adapter" else result.folder
    check_links(base)
    architecture = find_architecture(base)
    if architecture == "llama":
        check_llama(base)
    return Subject(result, base, architecture, find_tokenizer_folder(result, base))


def open_merged(subject: Subject, dtype: str, *, dequantized: bool) -> Merged:
    """Open the tensors of an export; `dtype` may be `auto`, that of the base checkpoint.

    Raises:
        ExportError: the adapter does not fit the base.
        CheckpointError: the base cannot be read or folded.
    """
    fold = Fold.open(subject.base) if subject.architecture == "yulanmini" else None
    tensors = fold.tensors if fold else open_tensors(subject.base)
    chosen = tensors.dtype("model.embed_tokens.weight") if dtype == "auto" else WEIGHT_DTYPES[dtype]
    shapes = list_llama_tensors(fold.config) if fold else {name: tensors.shape(name) for name in tensors.names}
    lineage = subject.result.lineage
    merged = Merged(
        tensors=tensors,
        specs=tuple(TensorSpec(name, shape, chosen) for name, shape in shapes.items()),
        dtype=chosen,
        adapter=read_adapter(subject.adapter, tensors) if subject.adapter else None,
        fold=fold,
        quantize=subject.quantize if dequantized else "none",
        quantized_dtype=WEIGHT_DTYPES[lineage.dtype] if lineage else chosen,
    )
    if merged.adapter is not None:
        reached = {merged.find_stored_name(spec.name) for spec in merged.specs}
        if lost := sorted(set(merged.adapter.changes) - reached):
            raise ExportError(f"{subject.adapter}: changes {lost[0]}, which has no counterpart in Llama weights")
    return merged


# A quantized run trains on weights that were quantized and dequantized. These functions make them again, one tensor at a time.
# Source: QLoRA (arXiv 2305.14314), section 3; LLM.int8() (arXiv 2208.07339), section 3. The arithmetic is bitsandbytes' own.
def is_quantized(name: str) -> bool:
    """Tell whether training quantizes a tensor of the base: only the weights of linear layers, not tables, norms or biases."""
    return name.endswith("_proj.weight")


def requantize(weight: torch.Tensor, quantize: str, dtype: torch.dtype) -> torch.Tensor:
    """Quantize a whole matrix from `dtype` to nf4 or int8 and dequantize it again, in float32."""
    functional = importlib.import_module("bitsandbytes.functional")
    matrix = weight.to(dtype)
    if quantize == "nf4":
        packed, state = functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
        restored: torch.Tensor = functional.dequantize_4bit(packed, state)
        return restored.float()
    rows, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
    restored = functional.int8_vectorwise_dequant(rows, scales)
    return restored.float()
