"""Why a stage of a chain cannot follow another, found before the first one trains."""

from collections.abc import Iterator, Sequence

from finetune.check.adoption import list_method_misfits
from finetune.check.preference_methods import check_continued_reference
from finetune.runs.export_settings import ExportSettings, list_refusals
from finetune.runs.resolved_recipe import ResolvedRecipe


def join_equal(problems: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return problems with those that several stages have in one line, under all their names."""
    stages: dict[str, list[str]] = {}
    for problem in problems:
        name, colon, fault = problem.partition(": ")
        own = colon and name in names
        stages.setdefault(fault if own else problem, []).append(name if own else "")
    return [f"{', '.join(dict.fromkeys(found))}: {fault}" if found[0] else fault for fault, found in stages.items()]


def list_following_problems(resolved: ResolvedRecipe, earlier: ResolvedRecipe) -> Iterator[str]:
    """Yield why a stage cannot continue from the one before; otherwise this would fail only after that one's training."""
    yield from list_method_misfits(earlier.method.name, resolved.method.name, "the stage before trains", "method")
    if not earlier.trains_all_weights:
        yield from check_continued_reference(resolved.recipe.trainer, resolved.recipe.adapter, resolved.method)


def list_export_problems(settings: ExportSettings, earlier: ResolvedRecipe) -> Iterator[str]:
    """Yield why the stage before cannot be exported like this; otherwise this would fail only after its training."""
    if earlier.method.trains_reward_model:
        yield "export: the stage before trains a reward model, but only language models can be exported; remove this stage"
    quantize = "none" if earlier.trains_all_weights else earlier.recipe.model.quantize
    init = earlier.recipe.adapter.init
    yield from list_refusals(settings, quantize, init, verifies=settings.verify, is_stage=True)
