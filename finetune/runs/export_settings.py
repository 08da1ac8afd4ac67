"""The options of an export, on the command line and in a chain, and the combinations that are refused."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from finetune.api_arguments import name_option
from finetune.errors import ExportError, describe_unknown_name
from finetune.files.sizes import parse_size
from finetune.recipe.sections import BEGINNINGS, AdapterInit, DtypeChoice

BaseChoice = Literal["full", "dequantized", "auto"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1"]
# llama.cpp's K-quants and i-quants have blocks of 256 values; the type whose size comes nearest stands beside the bits.
_NEAREST_TYPES = {"1": "q4_0", "2": "q4_0", "3": "q4_0", "4": "q4_1", "5": "q5_1", "6": "q8_0", "8": "q8_0"}
_BLOCKS_OF_256 = re.compile(r"(?:ud[-_])?i?q([1234568])_(?:k|xxs|xs|s|m|nl)(?:_.*)?|tq[12]_0")


@dataclass(frozen=True)
class ExportSettings:
    """How an export is written.

    `dtype` is the dtype of its weights; `auto` takes that of the base checkpoint. `max_shard_size` limits each weight file. `base`
    is what the adapter of a quantized run is merged into: the base checkpoint as published (`full`), as it was quantized
    (`dequantized`), or the one with the lower held-out loss (`auto`). `verify` reopens the export and compares it with what was
    trained. `gguf` names the types in which the export is also written as GGUF files.
    """

    dtype: DtypeChoice = "auto"
    max_shard_size: str = "2GB"
    base: BaseChoice = "full"
    verify: bool = True
    gguf: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse choices that do not exist, before anything is opened.

        Raises:
            ExportError: with the choices that exist.
        """
        for name, value, known in (("dtype", self.dtype, DtypeChoice), ("base", self.base, BaseChoice)):
            if value not in get_args(known):
                raise ExportError(f"export: {name}: {value!r} is {describe_unknown_name(str(value), get_args(known))}")
        for name in self.gguf:
            check_gguf_type(name)

    @property
    def max_shard_bytes(self) -> int:
        """The largest number of bytes of a weight file.

        Raises:
            OutputError: the size cannot be read.
        """
        return parse_size(self.max_shard_size)


def check_gguf_type(name: str) -> None:
    """Refuse a type that a GGUF file of this model family cannot have.

    Raises:
        ExportError: with the type to take instead.
    """
    if name in get_args(GgufType):
        return
    if found := _BLOCKS_OF_256.fullmatch(name.lower()):
        nearest = _NEAREST_TYPES.get(found[1] or "", "q4_0")
        raise ExportError(
            f"{name} stores blocks of 256 values, and the rows of YuLan-Mini have 1,920 and 4,800, which are no multiples "
            f"of 256 (llama.cpp itself writes q5_0 and q8_0 there instead); take {nearest}"
        )
    raise ExportError(f"the type {name!r} is {describe_unknown_name(name, get_args(GgufType))}")


def list_refusals(
    settings: ExportSettings, quantize: str, init: AdapterInit, *, verifies: bool, is_stage: bool
) -> Iterator[str]:
    """Yield the reasons why an adapter cannot be merged as the settings say.

    `quantize` is how its base was held in training, and `init` what the adapter began with.
    The reasons name the keys of a chain's stage, or the options of the command line.
    """
    name = "export.base:" if is_stage else "--base"
    in_python = "" if is_stage else " (base in Python)"
    skipped = "verify: false leaves out" if is_stage else f"{name_option('--no-verify')} skips"
    if settings.base == "dequantized" and quantize == "none":
        yield (
            f"{name} dequantized is for adapters of quantized runs, and this one was trained on an unquantized base; "
            f"use {name} full{in_python}"
        )
    if settings.base != "dequantized" and BEGINNINGS[init].holds_rounding:
        yield (
            f"{name} {settings.base}: the adapter began with {init}, so it holds a part of what {quantize} rounded off its base, which "
            f"another base still has; use {name} dequantized{in_python}, which is exactly what was trained"
        )
    if settings.base == "auto" and not verifies and quantize != "none":
        yield f"{name} auto chooses by measuring, which {skipped}; remove one of the two"
