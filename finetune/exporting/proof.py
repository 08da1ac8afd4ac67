"""The report of an export: how close it is to what was trained, and which base it was merged into."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BaseKind = Literal["full", "dequantized"]
BINDING = "xllamacpp"


def has_binding() -> bool:
    """Tell whether a llama.cpp binding is installed, with which files can be proved."""
    return importlib.util.find_spec(BINDING) is not None


@dataclass(frozen=True)
class Comparison:
    """How close an export is to what was trained.

    `max_abs` is the largest difference of a logit, `kl` the mean KL(trained || export) in nats, `top1_agreement` the share of
    positions with the same likeliest token. `texts` counts the trained rows that the reopened tokenizer was compared on. `effect_kl` is
    the mean KL(trained || base without the adapter), None without an adapter.

    `rounding_kl` is the mean KL that random errors as large as those of rounding give, None where the export is float32. `tolerance`
    is the largest KL that is taken for rounding; of float32, the largest difference of a logit.
    """

    max_abs: float
    kl: float
    top1_agreement: float
    rows: int
    positions: int
    effect_kl: float | None
    rounding_kl: float | None
    tolerance: float
    texts: int = 0


def describe_tolerance(comparison: Comparison, dtype: str) -> str:
    """Say what explains the difference between an export and what was trained, and how large it may be."""
    if comparison.rounding_kl is None:
        return f"the order of {dtype} sums explains differences up to {comparison.tolerance:.1e}"
    return f"rounding to {dtype} explains a KL of about {comparison.rounding_kl:.1e}, and {comparison.tolerance:.1e} is allowed"


@dataclass(frozen=True)
class BaseScore:
    """One way to merge, on held-out rows; `loss` in nats per trained token, the rest compared with the model as it was trained."""

    loss: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class BaseScores:
    """Scores of the adapter on its quantized base, as trained, and merged into either base; `tokens` counts trained tokens."""

    trained_loss: float
    full: BaseScore
    dequantized: BaseScore
    rows: int
    tokens: int

    @property
    def better(self) -> BaseKind:
        """Name the base with the lower loss."""
        return "dequantized" if self.dequantized.loss < self.full.loss else "full"


@dataclass(frozen=True)
class LlamaCppScores:
    """A GGUF file in llama.cpp beside its folder in transformers.

    `texts` counts the texts whose tokens are equal, `rows` the sides of stored rows that become the tokens that were trained, `max_abs` is the largest difference of a log-probability and `spread` their
    standard deviation, `kl` the mean KL(folder || file) in nats over `contexts`. `same_answers` of `answers` greedy answers are
    equal, and `stopped` of those that end by themselves in transformers do so here. `version` is the binding's.
    """

    version: str
    texts: int
    max_abs: float
    spread: float
    kl: float
    contexts: int
    answers: int
    same_answers: int
    stopped: int
    stopped_there: int
    rows: int = 0


@dataclass(frozen=True)
class GgufReport:
    """One GGUF file. `tensors` were compared with their source within half a step; it is 0 where nothing was compared.

    `llama_cpp` is None where no binding is installed.
    """

    output: Path
    type: str
    bytes: int
    seconds: float
    tensors: int
    llama_cpp: LlamaCppScores | None


@dataclass(frozen=True)
class ExportReport:
    """What was written; `verify` and `bases` are None without a comparison, `bases` also for unquantized runs."""

    output: Path
    dtype: str
    base: BaseKind
    bytes: int
    seconds: float
    bases: BaseScores | None
    verify: Comparison | None
    gguf: tuple[GgufReport, ...] = ()
