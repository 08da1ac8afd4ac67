"""What a step of a cleaning takes and returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from finetune.cleaning.row_spool import RowSpool
from finetune.data.encoding.rendering import ChatTemplate
from finetune.recipe.preparation.clean_section import CleanSection
from finetune.runs.resolved_recipe import ResolvedRecipe


@dataclass(frozen=True)
class CleanContext:
    """What all steps share: the recipe, the rows on disk, and the tokenizer with the template of the base checkpoint."""

    resolved: ResolvedRecipe
    spool: RowSpool
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate

    @property
    def section(self) -> CleanSection:
        """The section `clean` of the recipe."""
        return self.resolved.recipe.clean


@dataclass(frozen=True)
class Drop:
    """Why a row leaves: a kind by which rows are counted, and a text about this row."""

    kind: str
    text: str


@dataclass
class StepResult:
    """The rows that leave, by their numbers, the scores of rows by number and name, and notes for the report."""

    dropped: dict[int, Drop] = field(default_factory=dict)
    scores: dict[int, Mapping[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
