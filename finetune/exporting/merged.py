"""Compute the tensors of an export: read rows of the base, merge the adapter, fold, and round once."""

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from finetune.api_arguments import name_option
from finetune.errors import ExportError
from finetune.exporting.adapters.adapter_changes import Adapter
from finetune.exporting.adapters.adapter_reading import read_adapter
from finetune.exporting.chat_form import ChatForm, find_chat_form
from finetune.files.folders import check_links
from finetune.models.adapter_config import check_language_adapter, read_adapter_config
from finetune.recipe.sections import AdapterInit
from finetune.runs.lineage import find_base
from finetune.runs.results import Result, check_result_files
from finetune.yulan.folding import Fold, list_llama_tensors
from finetune.yulan.layout import Architecture, find_architecture, read_config
from finetune.yulan.llama_files import EMBEDDING, HEAD, is_tied, open_llama_tensors, ties_head
from finetune.yulan.shards import Piece, TensorSpec
from finetune.yulan.tensors import WEIGHT_DTYPES, TensorFolder, name_dtype
from finetune.yulan.tokenizer_files import describe_lost_legacy


@dataclass(frozen=True)
class Subject:
    """A result to export, and what belongs to it; `base` is its folder of base weights, or its own where all were trained."""

    result: Result
    base: Path
    architecture: Architecture

    @cached_property
    def form(self) -> ChatForm:
        """Tokenizer, chat template and stop tokens, after a check that a run was trained with them.

        Raises:
            TemplateError: the result was trained with another template.
        """
        return find_chat_form(self.result, self.base)

    @property
    def lost_legacy(self) -> str | None:
        """What a person must know of a tokenizer that has lost `legacy: true`, or None."""
        folder = self.form.tokenizer_folder
        return None if folder is None else describe_lost_legacy(folder)

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter, if there is one."""
        return self.result.folder if self.result.kind == "adapter" else None

    @property
    def quantize(self) -> str:
        """The quantization of the base while the adapter was trained on it."""
        lineage = self.result.lineage
        return "none" if lineage is None or self.adapter is None else lineage.quantize

    @property
    def init(self) -> AdapterInit:
        """What the adapter began with, as far as it is known."""
        return "default" if self.result.lineage is None else self.result.lineage.init


@dataclass(frozen=True)
class Merged:
    """The tensors of an export, computed on demand and rounded once; a `RowSource`.

    `ties_head`: the export's head is its embedding, as the base's is.
    """

    tensors: TensorFolder
    specs: tuple[TensorSpec, ...]
    dtype: torch.dtype
    adapter: Adapter | None
    fold: Fold | None
    quantize: str
    quantized_dtype: torch.dtype
    ties_head: bool

    @property
    def changes_nothing(self) -> bool:
        """Tell whether there is an adapter that has no effect."""
        return self.adapter is not None and self.adapter.is_empty

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the tables."""
        return next(spec.shape[0] for spec in self.specs if spec.name == EMBEDDING)

    def find_stored_name(self, name: str) -> str:
        """Return the name of the base tensor from which an exported one is made."""
        if self.fold is not None:
            return self.fold.find_stored_name(name)
        return EMBEDDING if name == HEAD and HEAD not in self.tensors.entries else name

    def find_change(self, name: str) -> str:
        """Return the name of the change of an exported tensor: a head that stays tied has those of the embedding."""
        return EMBEDDING if name == HEAD and self.ties_head else name

    def needs_whole(self, name: str) -> bool:
        """Tell whether a tensor can only be made whole, not row by row."""
        requantized = self.quantize != "none" and is_quantized(name)
        return requantized or (self.adapter is not None and self.adapter.needs_whole(self.find_change(name)))

    def is_rounded(self, name: str) -> bool:
        """Tell whether an exported tensor has been rounded to its type, and is not just a copy of the base's."""
        is_copy = self.fold is None and self.tensors.dtype(self.find_stored_name(name)) == self.dtype
        is_changed = self.adapter is not None and self.find_change(name) in self.adapter.changes
        return not is_copy or is_changed or (self.quantize != "none" and is_quantized(name))

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Read rows of the base and return the exported rows.

        Raises:
            ExportError: some are NaN or infinite.
        """
        change = self.find_change(piece.name)
        if self.adapter is not None and self.adapter.has_own_values(change):
            rows = self.adapter.make_own_rows(change, piece.start, piece.stop)
        else:
            rows = self._read_rows(piece)
            if self.adapter is not None:
                rows = self.adapter.merge_rows(change, piece.start, rows)
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

    def _read_rows(self, piece: Piece) -> torch.Tensor:
        if self.fold is not None:
            rows = self.fold.read_rows(piece)
        else:
            rows = self.tensors.read_rows(self.find_stored_name(piece.name), piece.start, piece.stop)
        if self.quantize != "none" and is_quantized(piece.name):
            return requantize(rows, self.quantize, self.quantized_dtype)
        return rows


def open_subject(result: Result, base_model: str | None = None) -> Subject:
    """Find the base and the architecture of a result; `base_model` names the base of an adapter instead of its own records.

    Raises:
        ExportError: the base has changed since the training, or the result is a reward model.
    """
    if result.is_reward_model:
        raise ExportError(
            f"{result.folder}: is a reward model, and only language models can be exported. Use the "
            "run as it is: `finetune evaluate` measures it on pairs"
        )
    if base_model is not None and not result.is_adapter:
        raise ExportError(
            f"{result.folder}: all weights were trained, so it has no base model; leave {name_option('--base-model')} out"
        )
    check_result_files(result)
    check_links(result.folder)
    if result.is_adapter:  # before a base is looked for, which may be a download
        check_language_adapter(result.folder, read_adapter_config(result.folder))
    base = find_base(result, base_model) if result.is_adapter else result.folder
    check_links(base)
    return Subject(result, base, find_architecture(base))


def open_merged(subject: Subject, dtype: str, *, dequantized: bool) -> Merged:
    """Open the tensors of an export; `dtype` may be `auto`, that of the base checkpoint.

    Raises:
        ExportError: the adapter does not fit the base.
        CheckpointError: the base cannot be read or folded.
    """
    fold = Fold.open(subject.base) if subject.architecture == "yulanmini" else None
    tensors = fold.tensors if fold else open_llama_tensors(subject.base)
    chosen = tensors.dtype(EMBEDDING) if dtype == "auto" else WEIGHT_DTYPES[dtype]
    # The parameters of the model that was trained: a tied head is one, and has no tensor of its own.
    trained = {name: tensors.shape(name) for name in tensors.names}
    trained.setdefault(HEAD, tensors.shape(EMBEDDING))
    adapter = read_adapter(subject.adapter, tensors, trained) if subject.adapter else None
    tied = is_tied(read_config(subject.base)) if fold is None else HEAD not in tensors.entries
    is_head_tied = ties_head(tensors, tied=tied) and not (adapter is not None and adapter.unties)
    shapes = list_llama_tensors(fold.config) if fold else trained
    if adapter is not None:
        shapes = {name: adapter.find_shape(name, shape) for name, shape in shapes.items()}
        if lost := sorted(set(adapter.changes) - set(shapes)):
            raise ExportError(f"{subject.adapter}: changes {lost[0]}, which has no counterpart in Llama weights")
    lineage = subject.result.lineage
    return Merged(
        tensors=tensors,
        # A fold writes the head in any case, since its factors differ from those of the embedding.
        specs=tuple(
            TensorSpec(name, shape, chosen)
            for name, shape in shapes.items()
            if fold or not is_head_tied or name != HEAD
        ),
        dtype=chosen,
        adapter=adapter,
        fold=fold,
        quantize=subject.quantize if dequantized else "none",
        quantized_dtype=WEIGHT_DTYPES[lineage.dtype] if lineage else chosen,
        ties_head=is_head_tied,
    )


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
