"""Check that rows, batches and the reference model fit the method. Never imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data.formats.row_formats import FORMATS, describe_wrong_kind
from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import BATCH
from finetune.recipe.sections import AdapterSection, DataSection


def settle_trainer(trainer: Mapping[str, Any], adapter: AdapterSection, method: Method) -> dict[str, Any]:
    """Return the trainer's options with the method's own defaults.

    Where all weights are trained, the reference model's log-probabilities are computed before step 1, so that no second copy of
    the weights is held.
    """
    defaults = dict(method.defaults)
    if method.has_reference and adapter.trains_all_weights:
        defaults["precompute_ref_log_probs"] = True
    return {**defaults, **trainer}


def check_shape(data: DataSection, method: Method) -> Iterator[str]:
    """Yield the settings of the section data that do not fit the rows of a method."""
    if data.format in FORMATS and (fault := describe_wrong_kind(FORMATS[data.format], method.shape)):
        yield f"data.format: {fault}"
    if method.shape == "sequence":
        return
    if data.train_on != "assistant":
        yield f"data.train_on: {method.name} always trains on whole answers; remove this key"
    if data.overflow == "split":
        yield f"data.overflow: split works only for plain texts, which {method.name} cannot train on; set error, drop or truncate"


def check_batch(trainer: Mapping[str, Any], method: Method) -> Iterator[str]:
    """Yield a problem where the micro-batch size is smaller than the method's loss needs."""
    found = trainer.get(BATCH, method.smallest_batch)
    if isinstance(found, int) and found < method.smallest_batch:
        yield (
            f"trainer.{BATCH}: {method.name} compares the answers of one micro-batch; set at least "
            f"{method.smallest_batch}; found {found}"
        )


def check_reference(
    trainer: Mapping[str, Any], adapter: AdapterSection, method: Method, *, continues_adapter: bool
) -> Iterator[str]:
    """Yield settings with which the reference model would be a second copy of the weights, or a wrong model."""
    precomputes = trainer.get("precompute_ref_log_probs")
    if not method.has_reference:
        return
    if adapter.trains_all_weights and precomputes is False:
        yield (
            "trainer.precompute_ref_log_probs: false would need a second copy of all weights as the reference model; "
            "remove this key"
        )
    if continues_adapter:
        yield from check_continued_reference(trainer, adapter, method)


def check_continued_reference(trainer: Mapping[str, Any], adapter: AdapterSection, method: Method) -> Iterator[str]:
    """Yield the problems of the reference model where a run continues an adapter."""
    if method.has_reference and trainer.get("precompute_ref_log_probs") and adapter.train_tokens:
        yield (
            "trainer.precompute_ref_log_probs: TRL computes these before it knows the token rows that the earlier run has "
            "trained; remove this key (a frozen copy of the adapter then takes hardly any memory)"
        )
    if method.has_reference and trainer.get("precompute_ref_log_probs") and adapter.modules_to_save:
        yield (
            "trainer.precompute_ref_log_probs: TRL computes these before the whole modules that the earlier run has trained "
            "(adapter.modules_to_save) have their float32 values; remove this key (the frozen copy of the adapter holds them)"
        )
