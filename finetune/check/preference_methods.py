"""Check what methods need of rows and batches, and what the reference model of a preference method costs. Never imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data.formats.row_formats import FORMATS, describe_wrong_kind
from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import BATCH
from finetune.recipe.sections import AdapterSection, DataSection


def settle_trainer(trainer: Mapping[str, Any], adapter: AdapterSection, method: Method) -> dict[str, Any]:
    """Return the trainer's options with the method's own defaults.

    Without an adapter the reference model is what was computed of the base before step 1.
    """
    defaults = dict(method.defaults)
    if method.has_reference and adapter.trains_all_weights:
        defaults["precompute_ref_log_probs"] = True
    return {**defaults, **trainer}


def check_shape(data: DataSection, method: Method) -> Iterator[str]:
    """Yield what the section data says that does not fit the rows of a method."""
    if data.format in FORMATS and (fault := describe_wrong_kind(FORMATS[data.format], method.shape)):
        yield f"data.format: {fault}"
    if method.shape == "sequence":
        return
    if data.train_on != "assistant":
        yield f"data.train_on: {method.name} learns from whole answers, so there is nothing to choose; remove this key"
    if data.overflow == "split":
        yield f"data.overflow: split is for texts, and {method.name} has none; set error, drop or truncate"


def check_batch(trainer: Mapping[str, Any], method: Method) -> Iterator[str]:
    """Yield that a micro-batch holds fewer rows than a method compares."""
    found = trainer.get(BATCH, method.smallest_batch)
    if isinstance(found, int) and found < method.smallest_batch:
        yield (
            f"trainer.{BATCH}: {method.name} compares the answers of one batch; set at least "
            f"{method.smallest_batch}; found {found}"
        )


def check_reference(
    trainer: Mapping[str, Any], adapter: AdapterSection, method: Method, *, continues_adapter: bool
) -> Iterator[str]:
    """Yield what would need a second copy of the weights as the reference model, or a wrong one."""
    precomputes = trainer.get("precompute_ref_log_probs")
    if not method.has_reference:
        return
    if adapter.trains_all_weights and precomputes is False:
        yield (
            "trainer.precompute_ref_log_probs: without it a second copy of all weights would be held as the reference; "
            "remove this key"
        )
    if continues_adapter:
        yield from check_continued_reference(trainer, adapter, method)


def check_continued_reference(trainer: Mapping[str, Any], adapter: AdapterSection, method: Method) -> Iterator[str]:
    """Yield what is wrong with the reference model of a run that continues an adapter."""
    if method.has_reference and trainer.get("precompute_ref_log_probs") and adapter.train_tokens:
        yield (
            "trainer.precompute_ref_log_probs: is computed before TRL knows the trained token rows of the earlier run; "
            "remove this key (the frozen copy of its adapter takes hardly any memory)"
        )
