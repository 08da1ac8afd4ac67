"""The table of steps, in the order in which they run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.cleaning.row_spool import Candidate
from finetune.cleaning.step_form import CleanContext, StepResult
from finetune.cleaning.steps.answer_steps import drop_surplus, drop_wrong_answers
from finetune.cleaning.steps.complexity import drop_complex
from finetune.cleaning.steps.judge_step import drop_lowest
from finetune.cleaning.steps.text_steps import (
    drop_by_rules,
    drop_contaminated,
    drop_exact_duplicates,
    drop_near_duplicates,
    drop_unreadable,
)
from finetune.recipe.preparation.clean_section import CleanSection


@dataclass(frozen=True)
class Step:
    """One step: its key in the section `clean`, whether a recipe turns it on, and the function that chooses what leaves.

    `is_clustered` says that the pipelines of other programs have this step too.
    """

    name: str
    is_on: Callable[[CleanSection], bool]
    run: Callable[[CleanContext, Sequence[Candidate]], StepResult]
    is_clustered: bool = False


STEPS: tuple[Step, ...] = (
    Step("unreadable", lambda section: section.unreadable, drop_unreadable, is_clustered=True),
    Step("rules", lambda section: bool(section.rules), drop_by_rules, is_clustered=True),
    Step("exact_duplicates", lambda section: section.exact_duplicates, drop_exact_duplicates, is_clustered=True),
    Step(
        "near_duplicates",
        lambda section: section.near_duplicates.threshold is not None,
        drop_near_duplicates,
        is_clustered=True,
    ),
    Step("decontaminate", lambda section: bool(section.decontaminate.against), drop_contaminated, is_clustered=True),
    Step("judge", lambda section: bool(section.judge.endpoint), drop_lowest),
    Step("complexity", lambda section: section.complexity.drop_above is not None, drop_complex),
    Step("verify", lambda section: section.verify.answers, drop_wrong_answers),
    Step("mix", lambda section: bool(section.mix.shares), drop_surplus),
)
