"""Check what preference methods need of a recipe: kinds of rows, batches that compare, a reference that costs nothing."""

from collections.abc import Iterator
from dataclasses import replace

from finetune.data.formats.row_formats import FORMATS, describe_wrong_kind
from finetune.recipe.methods import Method
from finetune.recipe.sections import Recipe
from finetune.runs.results import Result


def check_preference(recipe: Recipe, method: Method, earlier: Result | None) -> Iterator[str]:
    """Yield what a recipe says that its method cannot do."""
    yield from _check_shape(recipe, method)
    yield from _check_batch(recipe, method)
    yield from _check_reference(recipe, method, earlier)
    if method.trains_reward_model and recipe.model.architecture == "native":
        yield "model.architecture: a reward model is trained on the Llama form; remove this key"


def settle_trainer(recipe: Recipe, method: Method) -> Recipe:
    """Fill in the method's own defaults; without an adapter the reference is what was computed of the start."""
    defaults = dict(method.defaults)
    if method.has_reference and recipe.adapter.trains_all_weights:
        defaults["precompute_ref_log_probs"] = True
    return replace(recipe, trainer={**defaults, **recipe.trainer})


def _check_shape(recipe: Recipe, method: Method) -> Iterator[str]:
    data = recipe.data
    if data.format in FORMATS and (fault := describe_wrong_kind(FORMATS[data.format], method.shape)):
        yield f"data.format: {fault}"
    if method.shape == "sequence":
        return
    if data.train_on != "assistant":
        yield f"data.train_on: {method.name} learns from whole answers, so there is nothing to choose; remove this key"
    if data.overflow == "split":
        yield f"data.overflow: split is for texts, and {method.name} has none; set error, drop or truncate"


def _check_reference(recipe: Recipe, method: Method, earlier: Result | None) -> Iterator[str]:
    precomputes = recipe.trainer.get("precompute_ref_log_probs")
    if not method.has_reference:
        return
    if recipe.adapter.trains_all_weights and precomputes is False:
        yield (
            "trainer.precompute_ref_log_probs: without it a second copy of all weights would be held as the reference; "
            "remove this key"
        )
    if earlier is not None and earlier.is_adapter:
        yield from check_early_reference(recipe, method)


def check_early_reference(recipe: Recipe, method: Method) -> Iterator[str]:
    """Yield what is wrong with the reference of a recipe that goes on with an adapter."""
    precomputes = recipe.trainer.get("precompute_ref_log_probs")
    if method.has_reference and precomputes and recipe.adapter.train_tokens:
        yield (
            "trainer.precompute_ref_log_probs: is computed before TRL knows the trained token rows of the earlier run; "
            "remove this key (the frozen copy of its adapter takes hardly any memory)"
        )


def _check_batch(recipe: Recipe, method: Method) -> Iterator[str]:
    found = recipe.trainer.get("per_device_train_batch_size", method.smallest_batch)
    if isinstance(found, int) and found < method.smallest_batch:
        yield (
            f"trainer.per_device_train_batch_size: {method.name} compares the answers of one batch; set at least "
            f"{method.smallest_batch}; found {found}"
        )
