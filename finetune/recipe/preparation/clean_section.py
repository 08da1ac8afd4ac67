"""The section `clean` of a recipe: one key for each step of `finetune clean`. A step is off unless its key is set."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune.data.lint.findings import Thresholds


@dataclass(frozen=True)
class NearDuplicatesSection:
    """Rows that are nearly the same as an earlier one; a `threshold` turns the step on."""

    threshold: float | None = None
    ngram: int = 3
    permutations: int = 128
    compare: tuple[str, ...] = ("trained", "question")
    best_by: str = ""


@dataclass(frozen=True)
class DecontaminateSection:
    """Rows that share words with an evaluation set; files or tasks in `against` turn the step on."""

    against: tuple[str, ...] = ()
    task_data: str = ""
    ngram: int = 13


@dataclass(frozen=True)
class CleanJudgeSection:
    """A model that scores each answer; the name of an endpoint turns the step on."""

    endpoint: str = ""
    drop_lowest: float = 0.0
    prompt: str = "quality"
    attempts: int = 3
    max_tokens: int = 128


@dataclass(frozen=True)
class ComplexitySection:
    """`length_weight` x tokens + `loss_weight` x loss under the base checkpoint; `drop_above` turns the step on.

    Source: YuLan-Mini (arXiv 2412.17743), post-training.
    """

    drop_above: float | None = None
    length_weight: float = 0.0
    loss_weight: float = 1.0
    batch_size: int = 8


@dataclass(frozen=True)
class VerifySection:
    """Rows whose final answer differs from the true one; `answers` turns the step on."""

    answers: bool = False
    truth: str = "answer"


@dataclass(frozen=True)
class MixSection:
    """The shares of groups of rows; `shares` turns the step on."""

    shares: Mapping[str, float] = field(default_factory=dict)
    key: str = ""
    classifier: str = ""
    rows: int | None = None


@dataclass(frozen=True)
class CleanSection:
    """The steps of `finetune clean`, in the order in which they run."""

    unreadable: bool = False
    rules: tuple[str, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    exact_duplicates: bool = False
    near_duplicates: NearDuplicatesSection = field(default_factory=NearDuplicatesSection)
    decontaminate: DecontaminateSection = field(default_factory=DecontaminateSection)
    judge: CleanJudgeSection = field(default_factory=CleanJudgeSection)
    complexity: ComplexitySection = field(default_factory=ComplexitySection)
    verify: VerifySection = field(default_factory=VerifySection)
    mix: MixSection = field(default_factory=MixSection)
