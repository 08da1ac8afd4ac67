"""How far an export may differ from what was trained: as far as the rounding of its type explains.

Rounding to 16 bits gives each weight an error of at most half a step. What such errors do to a model is measured on the export itself:
it is run once more with random errors of that size, on the same rows.
"""

import zlib

import torch

from finetune.errors import ExportError, describe_count
from finetune.exporting.merged import Merged
from finetune.exporting.proof import Comparison
from finetune.models.streaming.from_disk import PART_ELEMENTS, ReadTensor, read_stored
from finetune.yulan.tensors import TensorFolder, name_dtype

# Merging in float32 and applying the adapter live differ in the order of sums only.
_FLOAT32_TOLERANCE = 1e-4
# KL grows with the square of an error, so errors three times as large as those of rounding are still taken for it. Measured on nano with
# adapters of all kinds, in bfloat16 and float16: rounding gave 0.65 to 1.19 times what the random errors gave; on a random model of
# full size, whose rows repeat (benchmarks/verification.py), 1.9 and 2.3 times that.
_TIMES_ROUNDING = 9.0
_SMALLEST_KL = 1e-8  # float32 sums in another order give less than this
# Rounding the weights to 16 bits moves logits by 2 to 7 % of their spread (measured on published checkpoints), which is
# a KL of order 1e-3. Where it takes a good part of the adapter's whole effect, the export is not what was trained.
_ROUNDED_KL = 0.02
_ROUNDED_SHARE_OF_EFFECT = 0.25


def read_with_errors(tensors: TensorFolder, merged: Merged) -> ReadTensor:
    """Return a function that reads an export's tensors with errors as large as those of rounding, in all that were rounded.

    The errors are spread evenly between minus and plus half a step, as those of rounding are.
    """
    noise = torch.rand(2 * PART_ELEMENTS, generator=torch.Generator().manual_seed(0)) - 0.5

    def change(name: str, rows: torch.Tensor) -> torch.Tensor:
        if not merged.is_rounded(name):
            return rows.float()
        # As whole numbers, 16-bit floating-point numbers stand in the order of their size: the next one is a step away.
        step = (rows.view(torch.int16) + 1).view(rows.dtype).float() - rows.float()
        start = zlib.crc32(name.encode()) % PART_ELEMENTS  # other errors in each tensor
        return rows.float() + step * noise[start : start + rows.numel()].reshape(rows.shape)

    return read_stored(tensors, change)


def find_float32_limit(trained: torch.Tensor) -> float:
    """Return the largest difference of a logit that the order of float32 sums explains, given the logits of the trained model."""
    return _FLOAT32_TOLERANCE * max(1.0, trained.std().item())


def find_rounded_limit(rounding_kl: float) -> float:
    """Return the largest KL that rounding explains, given the KL of random errors as large as those of rounding."""
    return max(_SMALLEST_KL, _TIMES_ROUNDING * rounding_kl)


def check_comparison(comparison: Comparison, dtype: torch.dtype) -> None:
    """Check that what an export differs by is explained by its type, and that rounding left the adapter's effect.

    Raises:
        ExportError: it is not what was trained.
    """
    found, limit, effect = comparison.kl, comparison.tolerance, comparison.effect_kl
    most = _ROUNDED_KL if effect is None else max(min(_ROUNDED_KL, _ROUNDED_SHARE_OF_EFFECT * effect), 1e-3)
    if comparison.rounding_kl is None:
        # The likeliest token may differ where two are equally likely, so only the size of the difference counts.
        if comparison.max_abs <= limit:
            return
        reason = f"logits differ by up to {comparison.max_abs:.2g} > {limit:.2g}"
    elif not found <= limit:  # NaN, too
        reason = (
            f"KL {found:.2g} > {limit:.2g}, which is what rounding to {name_dtype(dtype)} explains (the adapter itself moved its "
            f"base by {effect})"
        )
    elif not found <= most:
        reason = (
            f"rounding to {name_dtype(dtype)} alone gives a KL of {found:.2g} > {most:.2g} (the adapter itself moved its base by "
            f"{effect}); export with --dtype float32"
        )
    else:
        return
    raise ExportError(
        f"export: the reopened model is not what was trained: {reason}, same likeliest token in "
        f"{comparison.top1_agreement:.1%} of {describe_count(comparison.positions, 'position')}; nothing was left in the output"
    )
