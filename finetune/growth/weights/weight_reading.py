"""Open the weights of a checkpoint or a run, to be read some rows at a time, with the factors that a native checkpoint multiplies by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finetune.checkpoints.finding import find_checkpoint
from finetune.exporting.merged import open_merged, open_subject
from finetune.runs.results import Result, check_result_files, find_earlier
from finetune.yulan.folding import Fold, list_llama_tensors
from finetune.yulan.layout import find_architecture
from finetune.yulan.llama_files import open_llama_tensors
from finetune.yulan.shards import Piece

_ADDED_BY_FOLD = "o_proj.bias"  # zeros


@dataclass(frozen=True)
class Factor:
    """What a native checkpoint multiplies a stored tensor by: the factor as a whole, and the alpha that is a part of it."""

    scale: float = 1.0
    alpha: float | None = None


@dataclass(frozen=True)
class WeightSource:
    """Tensors under their names in Llama; `read` gives rows, and a tensor's weights in the model are `factors[name].scale` times those.

    `whole` names the tensors that can be read whole only.
    """

    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, Factor]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[Piece], torch.Tensor]
    whole: frozenset[str] = frozenset()


def open_weights(name: str) -> WeightSource:
    """Open a run directory, one of its checkpoints, an alias, a hub id or a folder. Nothing is run, and no fold is written.

    Raises:
        FinetuneError: there is no such model, or its files are damaged.
    """
    result = find_earlier(name)
    if result is None:
        return _open_folder(find_checkpoint(name))
    if result.is_adapter:
        return _open_adapter(result)
    check_result_files(result)
    return _open_folder(result.folder)


def _open_folder(folder: Path) -> WeightSource:
    if find_architecture(folder) == "llama":
        tensors = open_llama_tensors(folder)
        shapes = {name: tensors.shape(name) for name in tensors.names if tensors.dtype(name).is_floating_point}
        return WeightSource(
            shapes,
            {name: Factor() for name in shapes},
            {name: tensors.dtype(name) for name in shapes},
            lambda piece: tensors.read_rows(piece.name, piece.start, piece.stop),
        )
    fold = Fold.open(folder)
    shapes = {
        name: shape for name, shape in list_llama_tensors(fold.config).items() if not name.endswith(_ADDED_BY_FOLD)
    }
    factors = {
        name: Factor(fold.find_factor(name) if fold.is_multiple(name) else 1.0, fold.find_alpha(name))
        for name in shapes
    }
    dtypes = {
        name: fold.tensors.dtype(fold.find_stored_name(name)) if fold.is_multiple(name) else torch.float32
        for name in shapes
    }
    return WeightSource(shapes, factors, dtypes, partial(_read_native, fold))


def _read_native(fold: Fold, piece: Piece) -> torch.Tensor:
    rows = fold.read_rows(piece)
    return rows if fold.is_multiple(piece.name) else fold.fold_rows(piece.name, rows, torch.float32)


def _open_adapter(result: Result) -> WeightSource:
    merged = open_merged(open_subject(result), "float32", dequantized=False)
    shapes = {spec.name: spec.shape for spec in merged.specs if not spec.name.endswith(_ADDED_BY_FOLD)}
    whole = frozenset(name for name in shapes if merged.needs_whole(name))
    factors, dtypes = {name: Factor() for name in shapes}, dict.fromkeys(shapes, torch.float32)
    return WeightSource(shapes, factors, dtypes, merged.make_rows, whole)
