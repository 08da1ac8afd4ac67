"""Statistics of the weights of a checkpoint, read from its files a piece at a time; nothing is run.

A sample of the rows of each tensor is kept beside the figures, so that two checkpoints can be compared when only one of them is on the
disk, or none.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from finetune.errors import CheckpointError
from finetune.files.folders import write_folder
from finetune.files.json_files import read_json, write_json
from finetune.growth.weights.singular_values import find_largest
from finetune.growth.weights.weight_reading import WeightSource, open_weights
from finetune.yulan.shards import Piece, TensorSpec, write_shards

STATISTICS_FILE = "weights.json"
_SAMPLE_BYTES = 2 * 10**9  # more than any sample has, so that it is one file
_PIECE_ELEMENTS = 1 << 20
# Rows that are kept of a matrix, and of a table of tokens: 150 MB of a checkpoint of the published sizes.
_SAMPLED_ROWS, _SAMPLED_TOKENS = 64, 4096


@dataclass(frozen=True)
class Kind:
    """A kind of tensor: its name, the ending of its tensors' names, whether it is a table of tokens, and whether singular values are taken."""

    name: str
    ending: str
    is_table: bool = False
    is_decomposed: bool = False


KINDS: tuple[Kind, ...] = (
    Kind("embedding", "embed_tokens.weight", is_table=True),
    Kind("q", "q_proj.weight", is_decomposed=True),
    Kind("k", "k_proj.weight", is_decomposed=True),
    Kind("v", "v_proj.weight", is_decomposed=True),
    Kind("o", "o_proj.weight", is_decomposed=True),
    Kind("gate", "gate_proj.weight"),
    Kind("up", "up_proj.weight"),
    Kind("down", "down_proj.weight"),
    Kind("attention norm", "input_layernorm.weight"),
    Kind("MLP norm", "post_attention_layernorm.weight"),
    Kind("last norm", "model.norm.weight"),
    Kind("q bias", "q_proj.bias"),
    Kind("k bias", "k_proj.bias"),
    Kind("v bias", "v_proj.bias"),
    Kind("o bias", "o_proj.bias"),
    Kind("head", "lm_head.weight", is_table=True),
)


@dataclass(frozen=True)
class TensorStatistics:
    """The figures of one tensor as the model uses it, after all factors.

    `norm` is the root of the sum of squares, `rms` that of their mean. `scale` is the factor on the stored tensor, `alpha` the trained part
    of it; both belong to a native checkpoint. `largest` is the largest singular value, and `stable_rank` is (norm / largest)².
    """

    name: str
    kind: str
    layer: int | None
    norm: float
    rms: float
    scale: float
    alpha: float | None
    largest: float | None = None
    stable_rank: float | None = None


def find_kind(name: str) -> Kind | None:
    """Return the kind of a tensor by its name, or None for one that is no part of a language model."""
    return next((kind for kind in KINDS if name.endswith(kind.ending)), None)


@dataclass(frozen=True)
class _Measuring:
    """The sampled rows of every tensor, as a source for `write_shards`; making them measures the tensor."""

    source: WeightSource
    found: dict[str, TensorStatistics] = field(default_factory=dict)

    def needs_whole(self, name: str) -> bool:
        """Return True: a tensor is measured at once."""
        return True

    def make_rows(self, piece: Piece) -> torch.Tensor:
        """Read a tensor, keep its figures, and return its sampled rows."""
        self.found[piece.name], rows = _measure_tensor(self.source, piece.name)
        return rows


def measure_weights(name: str, output: Path) -> None:
    """Write the statistics and the sample of a checkpoint or a run into a new folder.

    Raises:
        FinetuneError: there is no such model, its files are damaged, or the folder cannot be written.
    """
    source = open_weights(name)
    specs = [
        TensorSpec(tensor, (len(_sample(shape, kind)), *shape[1:]), source.dtypes[tensor])
        for tensor, shape in source.shapes.items()
        if (kind := find_kind(tensor)) is not None
    ]
    measuring = _Measuring(source)
    with write_folder(output) as folder:
        write_shards(folder, specs, measuring, _SAMPLE_BYTES)
        statistics = [measuring.found[spec.name] for spec in specs]
        for one in statistics:
            if not math.isfinite(one.norm):
                raise CheckpointError(f"{name}: the tensor {one.name} holds NaN or infinite values; download it again")
        write_json(folder / STATISTICS_FILE, [asdict(one) for one in statistics])


def read_statistics(folder: Path) -> tuple[TensorStatistics, ...]:
    """Read what `measure_weights` wrote; nothing where it wrote nothing yet."""
    return tuple(TensorStatistics(**entry) for entry in read_json(folder / STATISTICS_FILE) or ())


def _sample(shape: tuple[int, ...], kind: Kind) -> range:
    """Return the rows of a tensor that are kept: all of a small one, and equal distances apart of a large one."""
    most = _SAMPLED_TOKENS if kind.is_table else _SAMPLED_ROWS if len(shape) > 1 else shape[0]
    return range(0, shape[0], -(-shape[0] // most))


def _measure_tensor(source: WeightSource, name: str) -> tuple[TensorStatistics, torch.Tensor]:
    kind, shape, factor = find_kind(name), source.shapes[name], source.factors[name]
    assert kind is not None
    sampled = _sample(shape, kind)
    squares, kept, largest = 0.0, [], None
    for piece in _divide(name, shape, kind.is_decomposed or name in source.whole):
        rows = source.read(piece)
        numbers = rows.float()
        # Summed in parts: a float32 sum over a whole table would lose four digits.
        squares += sum(float(part @ part) for part in numbers.flatten().split(1 << 16))
        first = -(-piece.start // sampled.step) * sampled.step
        kept.append(rows[first - piece.start :: sampled.step].clone())
        if kind.is_decomposed and math.isfinite(squares):
            largest = abs(factor.scale) * find_largest(numbers)
    norm = abs(factor.scale) * math.sqrt(squares)
    return (
        TensorStatistics(
            name,
            kind.name,
            _read_layer(name),
            norm,
            norm / math.sqrt(math.prod(shape)),
            factor.scale,
            factor.alpha,
            largest,
            (norm / largest) ** 2 if largest else None,
        ),
        torch.cat(kept),
    )


def _divide(name: str, shape: tuple[int, ...], is_whole: bool) -> Iterator[Piece]:
    rows = shape[0]
    step = rows if is_whole or len(shape) < 2 else max(1, _PIECE_ELEMENTS // shape[1])
    for start in range(0, rows, step):
        yield Piece(name, start, min(start + step, rows))


def _read_layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None
