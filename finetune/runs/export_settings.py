"""What an export can be asked for, on the command line and as a stage of a chain, and what it refuses."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from finetune.errors import ExportError, describe_unknown_name
from finetune.files.sizes import parse_size
from finetune.recipe.sections import DtypeChoice

BaseChoice = Literal["full", "dequantized", "auto"]


@dataclass(frozen=True)
class ExportSettings:
    """How an export is written.

    `dtype` is the type of its weights, `auto` that of the base as stored; `max_shard_size` limits a weight file. `base` is what
    the adapter of a quantized run is merged into: the base as published, the base as it was quantized, or whichever has the
    lower held-out loss. `verify` reopens the export and compares it with what was trained.
    """

    dtype: DtypeChoice = "auto"
    max_shard_size: str = "2GB"
    base: BaseChoice = "full"
    verify: bool = True

    def __post_init__(self) -> None:
        """Refuse choices that do not exist, before anything is opened.

        Raises:
            ExportError: with the choices that exist.
        """
        for name, value, known in (("dtype", self.dtype, DtypeChoice), ("base", self.base, BaseChoice)):
            if value not in get_args(known):
                raise ExportError(f"export: {name}: {value!r} is {describe_unknown_name(str(value), get_args(known))}")

    @property
    def max_shard_bytes(self) -> int:
        """The most bytes of a weight file.

        Raises:
            OutputError: the size cannot be read.
        """
        return parse_size(self.max_shard_size)


def list_refusals(settings: ExportSettings, quantize: str, *, verifies: bool, is_stage: bool) -> Iterator[str]:
    """Yield why the adapter of a run whose base was held as `quantize` cannot be merged as the settings say.

    The sentences name the keys of a chain's stage, or the options of the command line.
    """
    name = "export.base:" if is_stage else "--base"
    skipped = "verify: false leaves out" if is_stage else "--no-verify skips"
    if settings.base == "dequantized" and quantize == "none":
        yield (
            f"{name} dequantized is for adapters of quantized runs, and this one is trained on unquantized weights; "
            f"use {name} full"
        )
    if settings.base == "auto" and not verifies and quantize != "none":
        yield f"{name} auto chooses by measuring, which {skipped}; leave one of the two out"
