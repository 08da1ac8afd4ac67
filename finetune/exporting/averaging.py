"""Average the weights of several models or runs: rows of all of them are read side by side, averaged, and rounded once.

Source: Model Soups (arXiv 2203.05482), uniform soup; of checkpoints of one training run: LAWA (arXiv 2209.14981).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.data.encoding.tokenizer import load_tokenizer_file
from finetune.errors import ExportError, describe_count
from finetune.exporting.companions import describe_config, write_companions
from finetune.exporting.merged import Merged, Subject, open_merged, open_subject
from finetune.exporting.verify import compare_tensors
from finetune.files.folders import check_output_free, expand_home, write_folder
from finetune.files.json_files import write_json
from finetune.files.sizes import parse_size
from finetune.files.terminal import escape_controls
from finetune.runs.export_settings import ExportSettings, list_refusals
from finetune.runs.results import Result, find_earlier
from finetune.runs.run_files import EXPORT_REPORT_FILE
from finetune.yulan.llama_files import HEAD
from finetune.yulan.shards import Piece, TensorSpec, write_shards
from finetune.yulan.tensors import WEIGHT_DTYPES, name_dtype

# Of a configuration, what may differ between models whose weights are averaged.
_MAY_DIFFER = ("tie_word_embeddings", "dtype", "torch_dtype", "architectures", "max_position_embeddings")


@dataclass(frozen=True)
class AverageReport:
    """What was written; `bytes` counts the weights."""

    output: Path
    models: tuple[str, ...]
    dtype: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Averaged:
    """The mean of the tensors of several models, computed on demand in float64 and rounded once; a `RowSource`."""

    models: tuple[Merged, ...]
    specs: tuple[TensorSpec, ...]
    dtype: torch.dtype

    def needs_whole(self, name: str) -> bool:
        """Tell whether a model can only make a tensor whole."""
        return any(model.needs_whole(name) for model in self.models)

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Return the mean of the models' rows."""
        total = self.models[0].make_rows(piece).double()
        for model in self.models[1:]:
            total += model.make_rows(piece)
        return (total / len(self.models)).to(self.dtype)


def average_models(
    names: Sequence[str], output: Path, dtype: str = "auto", max_shard_size: str = "2GB"
) -> AverageReport:
    """Write the average of runs or models as a Llama folder, with the configuration and tokenizer of the first, and reopen it.

    A name is a run directory, one of its checkpoints, an alias, a hub id or a folder. `dtype` may be `auto`, that of the first.

    Raises:
        FinetuneError: fewer than two are named, one cannot be read, or two differ in more than their weights; no output is left.
    """
    started = time.monotonic()
    check_output_free(output)
    if len(names) < 2:
        raise ExportError(f"average: needs at least two models; found {len(names)}")
    subjects = [_open(name) for name in names]
    _check_bases(names, subjects)
    models = tuple(open_merged(subject, "float32", dequantized=False) for subject in subjects)
    _check_same_kind(names, subjects, models)
    first = models[0]
    chosen = open_merged(subjects[0], dtype, dequantized=False).dtype if dtype == "auto" else WEIGHT_DTYPES[dtype]
    # A head that is a table of its own in one of the models is one in their mean.
    widest = max(models, key=lambda model: len(model.specs))
    specs = tuple(replace(spec, dtype=chosen) for spec in widest.specs)
    averaged = _Averaged(models, specs, chosen)
    shown = replace(first, specs=specs, dtype=chosen, ties_head=all(spec.name != HEAD for spec in specs))
    with write_folder(output) as folder:
        size = write_shards(folder, specs, averaged, parse_size(max_shard_size))
        write_companions(folder, subjects[0], shown)
        compare_tensors(folder, averaged)
        report = AverageReport(output, tuple(names), name_dtype(chosen), size, round(time.monotonic() - started, 1))
        write_json(folder / EXPORT_REPORT_FILE, {"average_of": list(names), "dtype": report.dtype, "bytes": size})
        (folder / "README.md").write_text(_write_card(names), encoding="utf-8")
    return report


def _open(name: str) -> Subject:
    result = find_earlier(name)
    if result is None:
        result = Result("model", as_llama(find_checkpoint(name)), None, ())
    return open_subject(result)


def _check_bases(names: Sequence[str], subjects: Sequence[Subject]) -> None:
    """Check that every adapter can be merged into its unquantized base.

    Raises:
        ExportError: one cannot.
    """
    for name, subject in zip(names, subjects, strict=True):
        for reason in list_refusals(ExportSettings(), subject.quantize, subject.init, verifies=False, is_stage=False):
            raise ExportError(f"average: {name}: export it first, and average the exports ({reason})")


def _check_same_kind(names: Sequence[str], subjects: Sequence[Subject], models: Sequence[Merged]) -> None:
    """Check that models differ in their weights alone.

    Raises:
        ExportError: a setting, the shape of a tensor or the tokenizer differs.
    """
    first = _describe(subjects[0], models[0])
    for name, subject, model in zip(names[1:], subjects[1:], models[1:], strict=True):
        other = _describe(subject, model)
        for key in first | other:
            if first.get(key) != other.get(key):
                raise ExportError(
                    f"average: {names[0]} and {name} differ in {key} ({_show(first.get(key))} and {_show(other.get(key))}); only models "
                    "that differ in nothing but their weights can be averaged, such as checkpoints of one training"
                )


def _describe(subject: Subject, model: Merged) -> dict[str, Any]:
    """Return what must be equal: the configuration, the shapes but the head's, and the tokens."""
    config = {key: value for key, value in describe_config(subject, model).items() if key not in _MAY_DIFFER}
    shapes = {spec.name: spec.shape for spec in model.specs if spec.name != HEAD}
    folder = subject.form.tokenizer_folder
    tokens = None if folder is None else load_tokenizer_file(folder, needs_padding=False).get_vocab()
    return {**config, **shapes, "their tokens": tokens}


def _show(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else "other values"


def _write_card(names: Sequence[str]) -> str:
    listed = "\n".join(f"- `{escape_controls(str(expand_home(name).name)).replace('`', '')}`" for name in names)
    return f"# Average of {len(names)} models\n\nEvery weight is the mean of the weights of:\n\n{listed}\n"


def describe_average(report: AverageReport) -> str:
    """Return the report as text for a person."""
    return (
        f"{report.output}: average of {describe_count(len(report.models), 'model')}, {report.bytes / 1e6:,.1f} MB of {report.dtype} in "
        f"{report.seconds:.1f} s; reopened, every tensor is equal to the mean"
    )
